"""The benchmark suite: what it counts, refuses and measures."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

import lolcats_ops as lo
from bench import bars, calls, cases, measure, peers, run
from bench.__main__ import main
from bench.apart import runs
from bench.base import BaseError, base_server, commit_of, describe
from bench.cases import HYBRID, SMOLLM2, STANDARD, Case, select
from bench.remote import Refused, Server

RUNS = runs(STANDARD, ())
TINY = Case("hybrid_attention", H=2, Hk=2, T=3, D=2, V=5, f=3, window=4)


@pytest.fixture(autouse=True)
def same_settings():
    with run.restored():
        yield


@pytest.fixture
def wrong():
    """An implementation that does nothing of what it should."""
    peers.peers()["wrong"] = peers.Peer("zeros", {"feature_map": lambda x: lambda: _zeros(x)})
    yield "wrong"
    del peers.peers()["wrong"]


def _zeros(x):
    return x.q.new_zeros(*x.q.shape[:-1], x.case.F)


# What is counted


@pytest.mark.parametrize(
    ("op", "flops"),
    [
        ("feature_map", 12),  # 2 x 3 multiply-adds
        ("linear_attention", 24 + 60 + 60),  # two maps, 6 x 5 into the state and out of it
        ("hybrid_attention", 144 + 16 + 40),  # four scores of 2, four rows of 5
    ],
)
def test_useful_flops_of_one_token_and_head_by_hand(op, flops):
    one = replace(TINY, op=op, H=1, Hk=1, T=1)
    assert one.flops == flops
    assert replace(one, T=7, B=2, H=3).flops == 42 * flops
    assert replace(one, pass_="backward").flops == 2 * flops
    assert replace(one, pass_="forward+backward").flops == 3 * flops


def test_attention_transfer_adds_the_pairs_of_the_causal_teacher():
    transfer = replace(TINY, op="attention_transfer")
    pairs = 2 * (1 + 2 + 3)  # two heads
    assert transfer.flops - TINY.flops == pairs * 2 * (2 + 5)
    assert replace(transfer, pass_="backward").flops == TINY.flops


def test_bytes_by_hand():
    case = replace(TINY, Hk=1)
    assert replace(case, op="attention_transfer").bytes == case.bytes  # the teacher comes out
    q, k, v, maps, o = 2 * 3 * 2, 3 * 2, 3 * 5, 2 * 2 * 2 * 3, 2 * 3 * 5
    assert case.bytes == 4 * (q + k + v + maps + o)
    assert replace(case, dtype="bfloat16").bytes == 2 * (q + k + v + o) + 4 * maps
    state, window = 2 * 6 * (5 + 1), 4 * (2 + 5)
    step = (q + k + v + o) // 3 + maps + 2 * state + window
    assert replace(case, pass_="step").bytes == 4 * step


def test_names_of_cases_are_distinct_and_select_them():
    assert len({str(case) for case in STANDARD}) == len(STANDARD)
    assert select([]) == list(STANDARD)
    assert select(["step-*-H9"]) == [SMOLLM2]
    assert set(select(["step", "feature_map"])) == {
        case for case in STANDARD if case.pass_ == "step" or case.op == "feature_map"
    }
    with pytest.raises(ValueError, match="no case matches 'nonsense'"):
        select(["nonsense"])


def test_a_whole_name_selects_that_case_alone():
    assert cases.select([str(HYBRID)]) == [HYBRID]


def test_every_bar_is_about_something_the_standard_set_runs():
    measured = {(case, name) for case, name in RUNS}
    for bar in bars.BARS["cpu"]:
        assert {(q.case, q.implementation) for q in bar.over + bar.under} <= measured


# What is refused


@pytest.mark.parametrize(("case", "name"), RUNS, ids=[f"{c}-{n}" for c, n in RUNS])
def test_implementations_pass_the_gate_or_say_why_they_cannot_run(case, name):
    peer = peers.find(name)
    if (reason := peer.refusal(case, "cpu")) is None:
        calls.check(peer, replace(case, T=min(case.T, 128)))
    else:
        assert reason


def test_wrong_results_get_no_time(wrong):
    case = Case("feature_map", T=64)
    with pytest.raises(calls.WrongResult, match="off by"):
        calls.check(peers.find(wrong), case)
    rows, skips = run.run_together({case: ["lolcats", wrong]}, budget_s=1e-3)
    assert [row.implementation for row in rows] == ["lolcats"]
    assert skips[0].implementation == wrong
    assert "computes something else" in skips[0].reason


def test_a_peer_that_fails_costs_no_other_row(monkeypatch):
    def fail(x):
        raise TypeError("no argument 'g'")

    broken = peers.Peer("another library", {"feature_map": fail})
    find = peers.find
    monkeypatch.setattr(run, "find", lambda name: broken if name == "broken" else find(name))
    rows, skips = run.run_together(
        {Case("feature_map", T=64): ["broken", "lolcats"]}, budget_s=1e-3
    )
    assert [row.implementation for row in rows] == ["lolcats"]
    assert [skip.reason for skip in skips] == ["TypeError: no argument 'g'"]


def test_a_step_that_does_not_write_its_state_is_wrong():
    def prepare(x):
        state = x.state.clone()
        return lambda: lo.hybrid_attention_step_(x.q, x.k, x.v, *x.maps, x.gate, state)

    forgetful = peers.Peer("leaves its state as it was", {"step": prepare})
    with pytest.raises(calls.WrongResult, match="off by"):
        calls.check(forgetful, SMOLLM2)


@pytest.mark.parametrize(("name", "first"), [("late", 320), ("last", 399)])
def test_what_is_wrong_at_full_size_alone_gets_no_time(monkeypatch, name, first):
    """Beyond the short version, or the last token of one head, and nobody to compare it with."""

    def prepare(x):
        call = peers.peers()["lolcats"].prepare["hybrid_attention"](x)

        def wrong():
            y = call().clone()
            y[:, -1, first:] = 0
            return y

        return wrong

    broken = peers.Peer(name, {"hybrid_attention": prepare})
    monkeypatch.setitem(peers.peers(), name, broken)
    case = replace(HYBRID, T=400, dtype="bfloat16", peers=())
    calls.check(broken, case)
    rows, skips = run.run_together({case: [name, "lolcats"]}, budget_s=1e-3)
    assert [row.implementation for row in rows] == ["lolcats"]
    assert "off by" in skips[0].reason


@pytest.mark.parametrize("written", ["k_ring", "folded"])
def test_a_step_that_leaves_a_part_of_its_state_is_wrong(written):
    def prepare(x):
        step = peers.peers()["lolcats"].prepare["step"](x)

        def forgetful():
            before = x.state.tensors[written].clone()
            y = step()
            x.state.tensors[written].copy_(before)
            return y

        return forgetful

    with pytest.raises(calls.WrongResult, match="off by"):
        calls.check(peers.Peer("forgetful", {"step": prepare}), SMOLLM2)


def test_rows_are_compared_by_their_own_size_and_no_less_than_the_usual():
    """The first outputs of causal attention are many times as large as the others."""
    truth = torch.ones(1000, 4)
    truth[0] = 100
    off = truth.clone()
    off[0] *= 1 + 9e-5  # 3e-3 of the usual
    calls.compare((off,), (truth,), HYBRID)
    one = torch.ones(4000, 4)
    off = one.clone()
    off[-1] *= 1 + 5e-3  # 8e-5 of all
    with pytest.raises(calls.WrongResult, match=r"a row by 5\.0e-03"):
        calls.compare((off,), (one,), HYBRID)


def test_nan_is_a_wrong_result():
    nan, one = torch.tensor([math.nan]), torch.ones(1)
    with pytest.raises(calls.WrongResult):
        calls.compare((nan,), (one,), HYBRID)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementations", "lolcat"], "no implementation 'lolcat'"),
        (["--case", "nonsense"], "no case matches 'nonsense'"),
        (["--threads", "0"], "--threads: 0, needs 1 or more"),
        (["--budget", "nan"], "nan is no positive number of seconds"),
        (["--out", "/dev/null"], "--out /dev/null: "),
    ],
)
def test_what_does_not_exist_is_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_commit_that_is_none_is_named():
    with pytest.raises(BaseError, match="nonsense"), base_server("nonsense"):
        pass


def test_a_commit_is_called_by_the_name_that_stays_with_it():
    assert commit_of("HEAD") == commit_of("HEAD~0")
    assert describe("--exclude=*") == commit_of("HEAD")  # a release has a tag


def test_a_library_of_another_interface_is_named(tmp_path):
    (tmp_path / "lolcats_ops").mkdir()
    (tmp_path / "lolcats_ops" / "__init__.py").write_text("")
    with pytest.raises(RuntimeError, match="cannot start: ImportError"):
        Server(tmp_path)


# What is measured


def test_timers_take_turns_until_their_budgets_are_spent():
    turns = []

    class Clock:
        def __init__(self, name, cost):
            self.name, self.cost = name, cost

        def seconds(self, number):
            turns.append((self.name, number))
            return number * self.cost

    clocks = {"slow": Clock("slow", 1.0), "fast": Clock("fast", 1e-3), "tiny": Clock("tiny", 1e-5)}
    samples = measure.sample(clocks, 0.16, "cpu")
    turn = [*[("fast", 2)] * 5, ("slow", 1), *[("tiny", 200)] * 5]
    timed = turns[6:]  # after two calls of each
    rounds = [timed[i : i + len(turn)] for i in range(0, len(timed), len(turn))]
    assert [sorted(calls_) for calls_ in rounds] == [turn] * 16
    assert len({calls_[0] for calls_ in rounds}) == 3  # whoever comes first
    assert samples["slow"] == [1.0] * 16
    assert samples["fast"] == pytest.approx([1e-3] * 16)
    assert samples["tiny"] == pytest.approx([1e-5] * 16)
    turns.clear()
    measure.sample(clocks, 60, "cpu")
    assert turns.count(("tiny", 200)) == measure.CALLS


def test_a_turn_counts_for_one_however_many_calls_it_had():
    """While the machine is busy fast calls are fewer: among all calls they would count for less."""

    class Clock:
        turn = 0.0

        def __init__(self, cost):
            self.cost, self.now = cost, 0.0

        def seconds(self, number):
            busy = int(self.now / (self.cost * 10)) % 3 > 0  # two thirds of the time
            took = number * self.cost * (3 if busy else 1)
            self.now += took
            return took

    samples = measure.turns_of_calls({"a": Clock(7e-3)}, 16 * 10 * 7e-3)["a"]
    assert len(samples) == 16
    assert statistics.median(samples) == pytest.approx(3 * 7e-3)


def test_cases_that_bars_compare_take_turns(monkeypatch):
    long, other, wide = Case("feature_map", T=96), Case("feature_map", T=32), Case("feature_map")
    monkeypatch.setattr(cases, "TOGETHER", ((long, wide),))
    assert cases.in_groups([long, other, wide]) == [[long, wide], [other]]
    rows, skips = run.run_together({long: ["lolcats"], other: ["lolcats", "eager"]}, budget_s=1e-3)
    found = [(row.case, row.implementation) for row in rows]
    assert found == [(str(long), "lolcats"), (str(other), "lolcats"), (str(other), "eager")]
    assert len({row.mm_gflops_per_s for row in rows}) == 1  # of one run
    assert not skips


def test_another_process_times_what_it_is_asked_to():
    with Server(environment=run.ONLY_AVX2) as server:
        timer, isa, *_ = server.prepare("lolcats", Case("feature_map", T=64))
        assert isa == peers.find("lolcats").isa
        mm, isa, *_ = server.prepare(run.MM, HYBRID)
        assert isa in ("AVX2", "DEFAULT")
        assert mm.seconds(1) > 10 * timer.seconds(1) > 0  # both can be asked: 2048^3 and 64 tokens
        asked = []
        server._ask = lambda **request: asked.append(request) or {"refused": ""}
        for threads in (0, 3):
            with pytest.raises(Refused):
                server.prepare(run.MM, HYBRID, threads=threads)
        assert [request["threads"] for request in asked] == [torch.get_num_threads(), 3]
        del server._ask
        with pytest.raises(Refused, match="has no feature_map"):
            server.prepare("sdpa", Case("feature_map", T=64))


def test_extra_memory_is_what_a_call_takes_beyond_its_outputs():
    def call():
        temporary = torch.ones(1 << 24)  # 64 MB
        return (temporary[: 1 << 22].clone(),)

    extra = measure.extra_bytes(call, "cpu")
    assert extra is None or 0.9 * 2**26 < extra < 1.2 * 2**26


def test_rows_are_measured_against_products_of_their_own_kind():
    bf16 = Case("feature_map", T=64, dtype="bfloat16")
    names = ["lolcats", "lolcats:one_thread"]
    rows, _ = run.run_together({bf16: names, replace(bf16, dtype="float32"): names}, budget_s=1e-3)
    of_pairs = peers.find("lolcats").isa in run.OF_PAIRS
    kinds = {(row.dtype if of_pairs else "", row.threads): row.mm_gflops_per_s for row in rows}
    assert len({*kinds.values()}) == len(kinds) == len({row.mm_gflops_per_s for row in rows})
