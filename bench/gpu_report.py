"""``make gpu-report``: the conformance tests and all benchmarks on this machine's GPU, in a report.

What fails to compile, crashes, hangs or runs out of memory is a row with its error, and costs
nothing else. The report is also written after an interruption. Exit codes: 0 all conformance tests
passed, 1 some failed, 2 no GPU here, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import conformance
from .apart import run_apart, runs
from .base import describe
from .cases import Case
from .conformance import Result, run_tests
from .device import machine, why_absent
from .options import make_folder, make_parser, parse, positive_count, positive_seconds
from .plots import draw
from .report import MODEL_HEAD, model_rows, sections, table
from .results import Results, Row

BUDGET_S = 0.3  # of samples per implementation and case: thousands, on a GPU
TIMEOUT_S = 600.0  # Triton needs minutes to compile the widest backward passes
# A test is mostly the compilation of its own kernels; every process holds a context on the GPU.
JOBS = min(8, max(1, (os.cpu_count() or 1) // 2))
EXAMPLES = """\
examples:
  python -m bench.gpu_report
  python -m bench.gpu_report --tests "hybrid and bfloat16" --case T16384
  python -m bench.gpu_report --device cpu --tests "scalar and rewind" --case step-T64
"""


@dataclass
class Report:
    """What a run has found so far."""

    machine: str
    results: Results
    tests: list[Result] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """130, 1 or 0, as the module says."""
        if self.results.interrupted:
            return 130
        counts = conformance.counts(self.tests)
        return 0 if counts["passed"] and not counts["failed"] else 1

    def save(self, folder: Path) -> None:
        """report.json, report.md and the plots."""
        tests = conformance.as_json(self.tests)
        saved = {"machine": self.machine, "conformance": tests}
        saved |= asdict(self.results)
        (folder / "report.json").write_text(json.dumps(saved, indent=1) + "\n")
        draw(self.results, folder)
        (folder / "report.md").write_text("\n\n".join(self._page(folder)) + "\n")

    def _page(self, folder: Path) -> list[str]:
        parts = [f"# GPU report: {self.machine}"]
        if self.results.interrupted:
            parts.append("**The run was interrupted; what follows is what it had found.**")
        counts = conformance.counts(self.tests)
        parts += ["## Conformance", ", ".join(f"{n} {outcome}" for outcome, n in counts.items())]
        failed = [test for test in self.tests if test.outcome == "failed"]
        if failed:
            messages = [(test.name, " ".join(test.message.split())) for test in failed]
            parts.append(table(("failed", "message"), messages))
        parts += ["## Benchmarks", *sections(self.results, folder)]
        compared = model_rows(self.results)
        none = "It has no interval of a case and an architecture of this run."
        beside = table(MODEL_HEAD, compared) if compared else none
        return [*parts, "## Beside the static model", beside]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the stages that the command line asks for, and exits with the code of the report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, cases = parse(parser, arguments)
    if reason := why_absent(options.device):
        number = len(runs(cases, options.implementations))
        parser.exit(
            2,
            f"gpu-report: nothing runs on {options.device} here: {reason}. Where it does, this "
            f"would run the conformance tests on it, time {number} implementations of {len(cases)} "
            f"cases, and write report.json, report.md and plots to {options.out}.\n",
        )
    make_folder(parser, options.out)
    command = shlex.join(["python", "-m", "bench.gpu_report", *arguments])
    results = Results(command, describe("--dirty"), [], [], options.device)
    report = Report(machine(options.device), results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end a job
    try:
        _run(report, cases, options)
    except KeyboardInterrupt:
        report.results = replace(report.results, interrupted=True)
    report.save(options.out)
    _show(report, options.out)
    sys.exit(report.exit_code)


def _run(report: Report, cases: Sequence[Case], options: argparse.Namespace) -> None:
    """All stages; ``report`` has what they have found, whenever they end."""
    device = options.device
    log = options.out / "log.txt"
    log.unlink(missing_ok=True)
    limits = {"log": log, "timeout_s": options.timeout}
    columns = (
        TextColumn("{task.description:<100.100}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("conformance: collecting", total=None)
        arguments = [*conformance.TESTS, *(conformance.ON_GPU if device == "cuda" else ())]
        if options.tests:
            arguments += ["-k", options.tests]
        tests = run_tests(
            arguments,
            device,
            **limits,
            jobs=options.jobs,
            on_collected=lambda number: progress.update(task, total=number),
            on_start=lambda name: progress.update(task, description=f"conformance: {name}"),
        )
        with closing(tests):
            for test in tests:
                report.tests.append(test)
                progress.advance(task)
                if test.outcome == "failed":
                    said = f"failed: {test.name}: {test.message}"
                    progress.console.print(said, markup=False, soft_wrap=True)

        names = options.implementations
        task = progress.add_task("benchmarks", total=len(runs(cases, names)))
        found = run_apart(
            cases,
            names,
            device,
            budget_s=options.budget,
            **limits,
            on_start=lambda name: progress.update(task, description=f"benchmark: {name}"),
        )
        with closing(found):
            for row in found:
                results = report.results
                (results.rows if isinstance(row, Row) else results.skips).append(row)
                progress.advance(task)


def _show(report: Report, folder: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    counts = conformance.counts(report.tests)
    console.print("conformance:", ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    rows, skips = len(report.results.rows), len(report.results.skips)
    console.print(f"benchmarks: {rows} measured, {skips} not run")
    console.print(f"wrote {folder / 'report.md'}, report.json and plots", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "python -m bench.gpu_report",
        __doc__,
        EXAMPLES,
        budget_s=BUDGET_S,
        out="out/gpu",
        device="cuda",
    )
    parser.add_argument(
        "--tests", metavar="EXPRESSION", help="only these conformance tests, as pytest's -k"
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=TIMEOUT_S,
        metavar="SECONDS",
        help="for one test, or one implementation of a case (default %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=positive_count,
        default=JOBS,
        metavar="N",
        help="tests that run at a time; cases have the device alone (default %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
