"""The GPU report without a GPU: its stages on the CPU, and what it makes of crashes and of rows."""

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from bench import apart, bars, conformance, gpu_report, peers, plots, report
from bench.__main__ import main as bench_main
from bench.cases import CASES, FILLED, FILLING_DECODE, PUBLISHED, PUBLISHED_HYBRID, STANDARD, Case
from bench.isolated import Outcome, work_through
from bench.measure import TURNS, LocalTimer, cold_turns
from bench.published import MILLISECONDS
from bench.results import Results, Row, Skip
from lolcats_ops import _C

CHILD = """
import os, sys, time
from bench.isolated import Channel, serve

alive = True

def work(item):
    global alive
    if item == "raise":
        raise ValueError("no\\nsuch shape")
    if item == "crash":
        os.kill(os.getpid(), 11)
    if item == "hang":
        time.sleep(60)
    if item == "break the GPU":
        alive = False
        raise RuntimeError("an illegal memory access was encountered")
    print("this is no message")
    return item.upper(), os.getpid()

def synchronize():
    if not alive:
        raise RuntimeError("the context is lost")

serve(Channel(), work, synchronize)
"""

TESTS = """
import os
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 + 1 == 3, "sums are off"

def test_crashes():
    os.abort()

@pytest.mark.skip("needs another GPU")
def test_skips():
    pass

def test_comes_after_all_of_them():
    pass
"""


@pytest.fixture
def tests(tmp_path, monkeypatch):
    """A file of tests in place of the conformance matrix."""
    file = tmp_path / "test_stand_in.py"
    file.write_text(TESTS)
    monkeypatch.setattr(conformance, "TESTS", (str(file),))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load
    return file


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        gpu_report.main(["--device", "cpu", *arguments])
    return exit_.value.code


# Isolation


def outcomes(items: list[str], tmp_path, **options) -> dict[str, Outcome]:
    command = [sys.executable, "-c", CHILD]
    options = {"timeout_s": 20, **options}
    found = work_through(command, items, log=tmp_path / "log.txt", **options)
    return {outcome.item: outcome for outcome in found}


def test_an_item_that_fails_costs_no_other(tmp_path):
    found = outcomes(["a", "raise", "b", "crash", "c", "break the GPU", "d"], tmp_path)
    assert found["raise"].error == "ValueError: no such shape"
    assert found["crash"].error == "its process ended: SIGSEGV"
    assert "illegal memory access" in found["break the GPU"].error
    results = {item: found[item].value for item in "abcd"}
    assert [result[0] for result in results.values()] == ["A", "B", "C", "D"]
    pids = [result[1] for result in results.values()]
    assert pids[0] == pids[1]  # an exception leaves the process as it was
    assert len(set(pids)) == 3
    log = (tmp_path / "log.txt").read_text()
    assert "this is no message" in log
    assert "Traceback" in log


def test_children_share_the_items(tmp_path):
    found = outcomes(["a", "crash", "raise", "b", "c", "d", "e"], tmp_path, jobs=3)
    assert {item for item, outcome in found.items() if outcome.error} == {"crash", "raise"}
    assert len({outcome.value[1] for outcome in found.values() if outcome.value}) == 3


def test_an_item_that_hangs_is_ended(tmp_path):
    found = outcomes(["hang", "a"], tmp_path, timeout_s=2)
    assert found["hang"].error == "took longer than 2 s"
    assert found["a"].value[0] == "A"


def test_an_interruption_ends_the_process_that_works(tmp_path):
    command = [sys.executable, "-c", CHILD]
    found = work_through(command, ["a", "hang"], log=tmp_path / "log.txt", timeout_s=20)
    _, pid = next(found).value
    os.kill(pid, 0)  # it is there
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_cannot_start_fails_its_items_once(tmp_path):
    command = [sys.executable, "-c", "import nothing_of_this_name"]
    found = list(work_through(command, ["a", "b"], log=tmp_path / "log.txt", timeout_s=20))
    assert [o.item for o in found] == ["a", "b"]
    assert "did not start: its process ended: exit code 1" in found[0].error


# The command


def test_report_has_tests_that_crash_and_cases_that_are_measured(tests, tmp_path, capsys):
    out = tmp_path / "out"
    cases = ["--case", "step-T64", "--implementations", "lolcats", "fla"]
    assert run(*cases, "--budget", "0.001", "--out", str(out)) == 1

    saved = json.loads((out / "report.json").read_text())
    assert not saved["interrupted"]
    said = saved["conformance"]
    assert (said["passed"], said["failed"], said["skipped"]) == (2, 2, 1)
    messages = {test["name"].partition("::")[2]: test["message"] for test in said["not passed"]}
    assert "sums are off" in messages["test_fails"]
    assert messages["test_crashes"] == "its process ended: SIGABRT"
    assert "needs another GPU" in messages["test_skips"]
    rows = {(row["case"], row["implementation"], row["device"]) for row in saved["rows"]}
    assert rows == {("hybrid_attention-step-T64", "lolcats", "cpu")}
    assert all(row["median_s"] > 0 for row in saved["rows"])
    assert [skip["reason"] for skip in saved["skips"]] == ["has no step"]

    page = (out / "report.md").read_text()
    assert "2 passed, 2 failed, 1 skipped" in page
    assert "sums are off" in page
    assert "| hybrid_attention-step-T64 | lolcats |" in page
    for plot in ("roofline.png", "ceilings.png"):
        assert f"]({plot})" in page
        assert (out / plot).stat().st_size > 1000
    assert "failed: " in capsys.readouterr().err


def test_report_is_written_after_an_interruption(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        yield conformance.Result("test", "passed")
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler ends a job

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gpu_report, "run_tests", interrupted)
    try:
        assert run("--out", str(tmp_path)) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["interrupted"]
    assert saved["conformance"]["passed"] == 1
    assert "interrupted" in (tmp_path / "report.md").read_text()


def test_tests_that_cannot_be_collected_have_failed(tests, tmp_path):
    for text, message in (("import nothing_of_this_name", "nothing_of_this_name"), ("", "no test")):
        tests.write_text(text)
        (failed,) = conformance.run_tests(
            conformance.TESTS, "cpu", log=tmp_path / "log.txt", timeout_s=60
        )
        assert failed.outcome == "failed"
        assert message in failed.message


def test_a_report_without_a_passed_test_is_no_success():
    empty = gpu_report.Report("H100", Results("", "", [], [], "cuda"))
    assert empty.exit_code == 1
    empty.tests.append(conformance.Result("test", "passed"))
    assert empty.exit_code == 0


def test_without_a_gpu_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        gpu_report.main(["--out", str(tmp_path / "out")])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "nothing runs on cuda here" in said
    assert f"{len(CASES['cuda'])} cases" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as exit_:
        bench_main(["--device", "cuda"])
    assert exit_.value.code == 2
    assert "nothing runs on cuda here" in capsys.readouterr().err


# What it is made of


def on_gpu(seconds=lambda case, name: case.bytes / 2e12) -> Results:
    """A run of all cases on an H100 that does not exist."""
    rows = []
    for case, name in apart.runs(CASES["cuda"], ()):
        if name in ("lolcats", "sdpa", "graph:lolcats:triton"):
            rows.append(row_of(case, name, seconds(case, name)))
    skips = [Skip(str(case), "fla", "fla is not installed") for case in PUBLISHED.values()]
    return Results("python -m bench.gpu_report", "abc", rows, skips, "cuda")


def row_of(case: Case, name: str, s: float) -> Row:
    shape = {k: v for k, v in vars(case).items() if k != "peers"}
    gflops, gbytes = 1e-9 * case.flops / s, 1e-9 * case.bytes / s
    return Row(
        case=str(case), implementation=name, **shape, threads=16, device="cuda", isa="sm_90",
        flops=case.flops, bytes=case.bytes, samples=5, min_s=s, p20_s=s, median_s=s, p80_s=s,
        gflops_per_s=gflops, gbytes_per_s=gbytes, mm_gflops_per_s=6e5, copy_gbytes_per_s=2500.0,
        ceiling_fraction=max(gflops / 6e5, gbytes / 2500), extra_bytes=0, lolcats_ops="0.1.0",
        torch="2.13", python="3.11", machine="NVIDIA H100 80GB HBM3",
    )  # fmt: skip


def test_published_times_are_asked_for_twice_as_fast():
    half = {
        str(PUBLISHED[key]): 0.5e-3 * min(times)
        for shape, passes in MILLISECONDS.items()
        for key, times in (((shape, pass_), times) for pass_, times in passes.items())
    }
    assert len(half) == 12
    at_bar = on_gpu(lambda case, name: half.get(str(case), 1.0))
    verdicts = report.verdicts(at_bar)
    assert len(verdicts) == len(half)
    assert all(verdict.met for verdict in verdicts)
    slower = on_gpu(lambda case, name: 1.001 * half.get(str(case), 1.0))
    assert {verdict.result for verdict in report.verdicts(slower)} == {"missed"}
    other = replace(at_bar, rows=[replace(row, machine="A100") for row in at_bar.rows])
    assert "A100 ran, the bar is of an H100" in report.verdicts(other)[0].result


def test_page_and_plots_of_a_gpu(tmp_path):
    run_ = on_gpu()
    drawn = {path.name for path in plots.draw(run_, tmp_path)}
    assert drawn == {"time.png", "decode.png", "roofline.png", "ceilings.png"}
    page = "\n".join(report.sections(run_, tmp_path))
    assert "| 1, 8192, 96, 128 | forward | 0.726 | 0.682 |" in page
    assert "empty L2" in page
    assert "fla is not installed" in page
    gpu_report.Report("H100", replace(run_, rows=[])).save(tmp_path)
    assert "measured nothing" in (tmp_path / "report.md").read_text()


def test_times_are_compared_with_the_model_of_their_architecture(monkeypatch, tmp_path):
    def interval(target, pass_, window_kind, D, *, rows, tokens):
        assert (window_kind, D, rows, tokens) == ("sliding", 128, 96, 8192)
        return SimpleNamespace(low=1e-3, high=2e-3) if target == "sm_90" else None

    monkeypatch.setattr(report, "interval", interval)
    shape = (1, 8192, 96, 128)
    case, both = (PUBLISHED_HYBRID[shape, p] for p in ("forward", "forward+backward"))
    linear = row_of(PUBLISHED[shape, "forward"], "lolcats", 1e-3)
    for one, s, where in (
        (case, 1.5e-3, "inside"), (case, 3e-3, "1.50 x its end"), (case, 5e-4, "0.50 x its start"),
        (both, 3.5e-3, "inside"), (both, 1.5e-3, "0.75 x its start"),
    ):  # fmt: skip
        run_ = Results("", "", [linear, row_of(one, "lolcats", s)], [], "cuda")
        ((name, arch, _, _, said),) = report.model_rows(run_)
        assert (name, arch, said) == (str(one), "sm_90", where)
    older = Results("", "", [replace(run_.rows[1], isa="sm_80")], [], "cuda")
    assert report.model_rows(older) == []

    monkeypatch.setattr(gpu_report, "draw", lambda *_: [])
    gpu_report.Report("H100", run_).save(tmp_path)
    assert "0.75 x its start" in (tmp_path / "report.md").read_text()


def test_calls_on_a_gpu_take_turns_with_an_empty_cache(monkeypatch):
    turns = []

    def do_bench(call, *, rep, return_mode):
        turns.append((call(), rep, return_mode))
        return [2.0, 3.0]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    timers = {name: LocalTimer(lambda name=name: name, device="cuda") for name in ("a", "b")}
    samples = cold_turns(timers, 0.2)
    assert turns == [(name, pytest.approx(50), "all") for name in ("a", "b")] * TURNS["cuda"]
    assert samples == {name: [2e-3, 3e-3] * TURNS["cuda"] for name in ("a", "b")}


def test_names_of_cases_of_a_gpu_are_distinct_and_survive_json():
    assert len({str(case) for case in CASES["cuda"]}) == len(CASES["cuda"])
    for case in CASES["cuda"]:
        assert str(Case(**json.loads(json.dumps(asdict(case))))) == str(case)
    for bar in bars.BARS["cuda"]:
        assert {q.case for q in bar.over} <= set(CASES["cuda"])


def test_implementations_say_which_device_they_need():
    linear = next(case for case in STANDARD if "fla" in case.peers)
    assert peers.find("fla").refusal(linear, "cpu") == "runs on cuda, not on cpu"
    assert peers.find("sequential").refusal(linear, "cuda") == "runs on cpu, not on cuda"
    assert peers.find("graph:lolcats").refusal(FILLING_DECODE, "cpu") is not None
    assert peers.find("graph:lolcats").refusal(FILLING_DECODE, "cuda") is None
    if not _C.has_cuda():
        for name in ("lolcats:cuda", "graph:lolcats:cuda"):
            assert "no CUDA kernels" in peers.find(name).refusal(FILLING_DECODE, "cuda")


def test_a_report_times_both_kinds_of_kernels():
    timed = {(case.op, case.pass_): set() for case in FILLED}
    for case, name in apart.runs(FILLED, ()):
        timed[case.op, case.pass_].add(name)
    for names in timed.values():
        assert {"lolcats:cuda", "lolcats:triton"} <= names
    graphs = {"graph:lolcats:cuda", "graph:lolcats:triton"}
    assert graphs <= timed["hybrid_attention", "step"]
