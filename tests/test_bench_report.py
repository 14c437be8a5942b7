"""The benchmark suite: what a run writes, says and ends with."""

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import bars, plots, report, results
from bench.__main__ import main
from bench.apart import runs
from bench.cases import HYBRID, STANDARD
from lolcats_ops.cli import app

REPOSITORY = Path(__file__).parents[1]


def synthetic(seconds=lambda case, name: case.flops / (1e11 if name == "lolcats" else 1e10)):
    """A run of the standard set, without the machine."""
    rows = []
    for case, name in runs(STANDARD, ()):
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
