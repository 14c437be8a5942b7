"""The benchmark suite: what it counts, refuses, measures and writes."""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lolcats_ops as lo
from bench import bars, calls, cases, measure, peers, plots, report, results, run
from bench.__main__ import main
from bench.base import BaseError, base_server, commit_of, describe
from bench.cases import HYBRID, SMOLLM2, STANDARD, Case, select
from bench.remote import Refused, Server
from lolcats_ops.cli import app

REPOSITORY = Path(__file__).parents[1]
RUNS = [(case, name) for case in STANDARD for name in ("lolcats", *case.peers)]
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


def synthetic(seconds=lambda case, name: case.flops / (1e11 if name == "lolcats" else 1e10)):
    """A run of the standard set, without the machine."""
    rows = []
    for case, name in RUNS:
        s = seconds(case, name)
        numbers = {"samples": 5, "min_s": s, "p20_s": s, "median_s": s, "p80_s": s}
        gflops, gbytes = 1e-9 * case.flops / s, 1e-9 * case.bytes / s
        rows.append(
            results.Row(
                case=str(case),
                implementation=name,
                **{k: v for k, v in vars(case).items() if k != "peers"},
                device="cpu",
                isa="avx512_bf16",
                threads=2,
                flops=case.flops,
                bytes=case.bytes,
                **numbers,
                gflops_per_s=gflops,
                gbytes_per_s=gbytes,
                mm_gflops_per_s=200.0,
                copy_gbytes_per_s=40.0,
                ceiling_fraction=max(gflops / 200, gbytes / 40),
                extra_bytes=None if name == "flex" else 1 << 20,
                lolcats_ops="0.1.0",
                torch="2.13",
                python="3.11",
                machine='a "quoted", CPU',
            )
        )
    skips = [results.Skip(str(HYBRID), "fla", "fla is not installed")]
    return results.Results("python -m bench", "abc", rows, skips)


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


# What is written


def test_results_survive_json_and_csv(tmp_path):
    run_ = synthetic()
    run_.save(tmp_path)
    assert results.Results.load(tmp_path) == run_
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    given = [{name: "" if x is None else str(x) for name, x in vars(r).items()} for r in run_.rows]
    assert lines == given


def test_page_shows_bars_rows_skips_and_pictures(tmp_path):
    run_ = synthetic()
    drawn = plots.draw(run_, tmp_path)
    assert {path.name for path in drawn} == {
        "time.png",
        "decode.png",
        "roofline.png",
        "ceilings.png",
    }
    page = report.write_page(run_, tmp_path).read_text()
    for bar in bars.BARS["cpu"]:
        assert f"| {bar.claim} | {bar.limit} |" in page
    for row in run_.rows:
        assert f"| {row.case} | {row.implementation} |" in page
    assert "fla is not installed" in page
    assert all(f"]({path.name})" in page for path in drawn)


def test_a_page_has_no_pictures_of_an_earlier_run(tmp_path):
    run_ = synthetic()
    plots.draw(run_, tmp_path)
    run_ = replace(run_, rows=run_.rows[:1])
    plots.draw(run_, tmp_path)
    assert "decode.png" not in report.write_page(run_, tmp_path).read_text()


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        yield synthetic().rows, []
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.__main__.run_cases", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["--out", str(tmp_path)])
    assert exit_.value.code == 130
    found = results.Results.load(tmp_path)
    assert found.interrupted
    assert found.rows == synthetic().rows
    assert "was interrupted" in (tmp_path / "bench.md").read_text()


def test_a_wrong_result_of_this_library_fails_the_run(monkeypatch, tmp_path):
    def refused(*_, **__):
        yield synthetic().rows, [results.Skip(str(HYBRID), "lolcats", "computes something else")]

    monkeypatch.setattr("bench.__main__.run_cases", refused)
    with pytest.raises(SystemExit) as exit_:
        main(["--out", str(tmp_path)])
    assert exit_.value.code == 3


def test_a_library_of_another_checkout_is_not_timed_as_this_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.__main__.CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "of which this checkout does not know the commit" in capsys.readouterr().err


def test_an_instruction_set_that_there_is_not_is_named(tmp_path):
    command = [sys.executable, "-m", "bench", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "LOLCATS_ISA": "bogus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "LOLCATS_ISA is 'bogus', needs one of" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_measures_nothing_fails_and_says_why(tmp_path, capsys):
    options = ["--case", "feature_map", "--implementations", "sdpa", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        main(options)
    assert exit_.value.code == 1
    assert "sdpa has no feature_map" in capsys.readouterr().out


def test_a_whole_name_selects_that_case_alone():
    assert cases.select([str(HYBRID)]) == [HYBRID]


def test_a_machine_that_was_busy_is_said_to_be():
    run_ = synthetic()
    assert report.unsteady(run_) is None
    run_.rows[7] = replace(run_.rows[7], mm_gflops_per_s=100.0)
    assert "100 to 200 GFLOP/s" in report.unsteady(run_)


def test_a_row_that_was_slow_for_a_while_is_said_to_be():
    run_ = synthetic()
    at = next(i for i, r in enumerate(run_.rows) if r.case == str(HYBRID))
    run_.rows[at] = replace(run_.rows[at], p80_s=1.6 * run_.rows[at].p20_s)
    assert "1 of " in report.unsteady(run_)
    bar = bars.Bar("2x", (bars.Quantity(HYBRID, "sdpa"),), (bars.Quantity(HYBRID),), at_least=2)
    assert bars.judge(bar, run_).result == "met, unsteady"
    run_.rows.append(replace(run_.rows[at], implementation="lolcats@abc"))
    assert report.base_rows(run_)[0][-1] == "1.00, unsteady"


def test_one_thread_says_nothing_of_two():
    run_ = synthetic()
    one = [replace(row, threads=1) for row in run_.rows]
    (bar,) = (bar for bar in bars.BARS["cpu"] if "one head" in bar.claim)
    assert bars.judge(bar, run_).value is not None
    assert "1 thread ran" in bars.judge(bar, replace(run_, rows=one)).result


def test_rows_are_measured_against_products_of_their_own_kind():
    bf16 = Case("feature_map", T=64, dtype="bfloat16")
    names = ["lolcats", "lolcats:one_thread"]
    rows, _ = run.run_together({bf16: names, replace(bf16, dtype="float32"): names}, budget_s=1e-3)
    of_pairs = peers.find("lolcats").isa in run.OF_PAIRS
    kinds = {(row.dtype if of_pairs else "", row.threads): row.mm_gflops_per_s for row in rows}
    assert len({*kinds.values()}) == len(kinds) == len({row.mm_gflops_per_s for row in rows})


def test_bars_are_ratios_of_medians():
    bar = bars.Bar("2x", (bars.Quantity(HYBRID, "sdpa"),), (bars.Quantity(HYBRID),), at_least=10.1)
    verdict = bars.judge(bar, synthetic())
    assert verdict.value == pytest.approx(10)
    assert verdict.result == "missed"
    assert bars.judge(replace(bar, at_least=9.9), synthetic()).result == "met"
    assert "avx512_bf16 ran" in bars.judge(replace(bar, isas=("neon",)), synthetic()).result
    told = bars.judge(replace(bar, at_least=None), synthetic())
    assert (told.bar.limit, told.result, told.met) == ("", "", True)
    skipped = replace(bar, over=(bars.Quantity(HYBRID, "fla"),))
    assert bars.judge(skipped, synthetic()).result == "not measured: fla: fla is not installed"


def test_crossover_lies_between_the_lengths_around_it():
    softmax = [(T, T * T) for T in (64, 256, 1024)]
    assert plots.crossover([(T, 100 * T) for T in (64, 256, 1024)], softmax) == pytest.approx(100)
    assert plots.crossover([(T, T) for T in (64, 256)], softmax) == pytest.approx(64)
    assert math.isinf(plots.crossover([(T, 2 * T * T) for T in (64, 256)], softmax))


def test_command_writes_tables_and_a_page(tmp_path):
    arguments = ["bench", "--case", "step-T256", "--budget", "0.001", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    found = results.Results.load(tmp_path)
    assert [row.implementation for row in found.rows] == ["lolcats", "sdpa"]
    assert found.command == f"lolcats bench --case step-T256 --budget 0.001 --out {tmp_path}"
    assert "step-T256 | sdpa" in (tmp_path / "bench.md").read_text()


def test_command_says_where_the_suite_is(monkeypatch, tmp_path):
    monkeypatch.setattr("lolcats_ops.__file__", str(tmp_path / "lolcats_ops" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, ["bench", "--list"]).exception
    assert "run this in a checkout" in str(error)


def test_pytest_benchmark_runs_the_same_cases(tmp_path):
    file = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "-k", "step-T256-lolcats"]
    command += ["--benchmark-max-time=0.01", f"--benchmark-json={file}"]
    # In a worker of pytest-xdist, and in its children, pytest-benchmark measures nothing.
    own = {name: value for name, value in os.environ.items() if "PYTEST_XDIST" not in name}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    (saved,) = json.loads(file.read_text())["benchmarks"]
    assert saved["group"] == "hybrid_attention-step-T256"
    assert saved["stats"]["median"] > 0
