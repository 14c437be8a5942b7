"""``python -m bench``: times the standard set of cases, and writes tables, plots and a page."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import lolcats_ops as lo

from . import CHECKOUT
from .base import BaseError, base_server, commit_of, describe
from .cases import Case
from .device import why_absent
from .measure import keep_freed_memory
from .options import make_folder, make_parser, parse, positive_count
from .peers import peers
from .plots import draw
from .report import (
    BAR_HEAD,
    BASE_HEAD,
    bar_row,
    base_rows,
    duration,
    unsteady,
    verdicts,
    write_page,
)
from .results import Results, Row, Skip
from .run import BUDGET_S, run_cases

# Exit codes: nothing could be measured; this library failed, or was wrong; Ctrl-C.
NOTHING, WRONG, INTERRUPTED = 1, 3, 130

EXAMPLES = """\
examples:
  python -m bench --list
  python -m bench --case step --budget 0.2
  python -m bench --case forward-T2048 --implementations lolcats lolcats:avx2 sdpa
  python -m bench --case hybrid --base HEAD~1
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m bench") -> None:
    """Runs the suite as the command line says."""
    parser = _parser(prog)
    arguments = sys.argv[1:] if arguments is None else arguments
    options, cases = parse(parser, arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.list:
        _list(cases)
        return
    if reason := why_absent(options.device):
        parser.exit(2, f"{prog}: nothing runs on {options.device} here: {reason}\n")
    if (library := Path(lo.__file__).resolve().parents[1]) != CHECKOUT:
        parser.exit(
            2,
            f"{prog}: lolcats_ops is that of {library}, of which this checkout does not know the "
            "commit: `make build` here, or pip install --editable '.[bench]'\n",
        )
    make_folder(parser, options.out)
    keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    columns = (
        TextColumn("{task.description:<48}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows: list[Row] = []
    skips: list[Skip] = []
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end a job
    try:
        with (
            ExitStack() as stack,
            # A thread that refreshes the bar would take a core from what is timed.
            Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress,
        ):
            task = progress.add_task("", total=len(cases))
            bases = {}
            for commit, ref in {commit_of(ref): ref for ref in options.base}.items():
                progress.update(task, description=f"building {ref}")
                progress.refresh()
                bases[f"lolcats@{commit}"] = stack.enter_context(base_server(ref))
            started: list[Case] = []

            def on_cases(group: Sequence[Case]) -> None:
                progress.update(task, description=str(group[0]), completed=len(started))
                progress.refresh()
                started.extend(group)

            for measured, skipped in run_cases(
                cases,
                options.implementations,
                device=options.device,
                budget_s=options.budget,
                bases=bases,
                on_cases=on_cases,
            ):
                rows += measured
                skips += skipped
            progress.update(task, description="done", completed=len(cases))
    except BaseError as error:
        parser.exit(1, f"{prog}: {error}\n")
    except KeyboardInterrupt:
        if not rows:
            parser.exit(INTERRUPTED, f"{prog}: interrupted before anything was measured\n")
        interrupted = True
    command = shlex.join([*prog.split(), *arguments])
    results = Results(command, describe("--dirty"), rows, skips, options.device, interrupted)
    results.save(options.out)
    draw(results, options.out)
    page = write_page(results, options.out)
    _show(console, results)
    if rows and (warning := unsteady(results)):
        console.print(warning, style="yellow")
    console.print(f"wrote {page}, results.csv, results.json and plots")
    wrong = any(skip.implementation == "lolcats" for skip in skips)  # it refuses no case
    if interrupted or wrong or not rows:
        sys.exit(INTERRUPTED if interrupted else WRONG if wrong else NOTHING)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, __doc__, EXAMPLES, budget_s=BUDGET_S, out="out/bench", device="cpu")
    parser.add_argument(
        "--base",
        action="append",
        default=[],
        metavar="REF",
        help="also build and time the library of this commit; repeat for more",
    )
    parser.add_argument(
        "--threads", type=positive_count, metavar="N", help="threads of the CPU (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="show cases and implementations")
    return parser


def _list(cases: Sequence[Case]) -> None:
    for case in cases:
        print(f"{case!s:<52} {' '.join(case.peers)}".rstrip())
    print("\nimplementations:")
    for name, peer in peers().items():
        print(f"{name:<52} {peer.about}")


def _show(console: Console, results: Results) -> None:
    """The bars and the comparison with other commits; for a run without either, the times."""
    judged, against = verdicts(results), base_rows(results)
    for skip in results.skips:
        console.print(f"{skip.case}: {skip.implementation} {skip.reason}", style="yellow")
    if judged:
        table = Table(*BAR_HEAD, box=None)
        for verdict in judged:
            style = "" if verdict.met else "yellow" if verdict.why_not else "red"
            table.add_row(*bar_row(verdict), style=style)
        console.print(table)
    if against:
        table = Table(*BASE_HEAD, box=None)
        for row in against:
            table.add_row(*row)
        console.print(table)
    if not judged and not against:
        table = Table("case", "implementation", "median", "GFLOP/s", "of ceiling", box=None)
        for row in results.rows:
            numbers = f"{row.gflops_per_s:.1f}", f"{row.ceiling_fraction:.2f}"
            table.add_row(row.case, row.implementation, duration(row.median_s), *numbers)
        console.print(table)


if __name__ == "__main__":
    main()
