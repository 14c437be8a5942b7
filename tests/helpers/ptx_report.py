"""Runs the compiled PTX of the Triton operators on the CPU and says what it did.

    TRITON_INTERPRET=0 PYTHONPATH=tests python -m helpers.ptx_report [--json FILE] sm_90 CASE ...

Prints a table per case: results against the reference, races, bytes of global memory, and every
access of the loops with its sectors and bank conflicts. Without cases it runs all of them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_on_cpu.ptx.report import Access

from .compiled import CASES, Run, run_case
from .planted_bugs import noticed


def facts(runs: list[Run], wrong: str) -> dict[str, Any]:
    """What a test asks of a case, as JSON."""
    return {
        "wrong": wrong,
        "findings": [finding for run in runs for finding in run.findings],
        "launches": [
            {"kernel": run.launch.kernel, "moved": run.moved, "sizes": run.sizes} for run in runs
        ],
    }


def table(runs: list[Run]) -> Iterator[str]:
    """Lines about the launches of a case."""
    for run in runs:
        moved, least = sum(run.moved.values()), sum(run.sizes.values())
        yield f"  {run.launch.kernel}, {run.launch.grid[0]} programs: {moved} bytes,"
        yield f"    {moved / least:.2f} times its tensors; of each"
        for name, size in run.sizes.items():
            yield f"      {name:24} {size:9} bytes {run.moved[name] / size:8.2f} times"
        yield from accesses(run.report.accesses)


def accesses(found: list[Access]) -> Iterator[str]:
    """Lines about the memory instructions in loops, those of a source line and opcode together.

    Efficiency is the ideal number of sectors (of global memory) or wavefronts (of shared memory)
    over the actual one, and more than 100 % where lanes load the same.
    """
    groups: dict[tuple[str, str], list[Access]] = defaultdict(list)
    for access in found:
        if access.looped:
            opcode = next(w for w in access.instruction.split() if not w.startswith("@"))
            groups[access.location, opcode].append(access)
    yield f"    {'in loops':24} {'instruction':36} count requests   sectors     banks"
    for (location, opcode), group in sorted(groups.items()):
        requests = sum(access.requests for access in group)
        sectors = _efficiency(group, "ideal_sectors", "sectors")
        banks = _efficiency(group, "ideal_wavefronts", "wavefronts")
        yield f"    {location:24} {opcode:36} {len(group):5} {requests:8} {sectors:>9} {banks:>9}"


def _efficiency(group: list[Access], ideal: str, actual: str) -> str:
    total = sum(getattr(access, actual) for access in group)
    return f"{100 * sum(getattr(access, ideal) for access in group) / total:.0f} %" if total else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=("sm_80", "sm_90"))
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=str([*CASES]))
    parser.add_argument("--json", type=Path, help="write facts and planted bugs here")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the machine executes on one; two of these may run side by side
    result: dict[str, Any] = {}
    for name in options.cases:
        runs, wrong = run_case(options.target, name)
        result[name] = facts(runs, wrong)
        print(f"{options.target}, {name}: {wrong or 'right'}", flush=True)
        for line in (*(f"  {one}" for one in result[name]["findings"]), *table(runs)):
            print(line)
    if options.json:
        document = {"cases": result, "bugs": noticed(options.target)}
        options.json.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
