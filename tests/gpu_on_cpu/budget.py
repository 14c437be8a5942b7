"""Holds builds to the numbers of a committed file: what tests cannot see, a kernel may still lose.

python -m pytest ... fails with        forward sm_90 w4 s2: registers 168, at most 128
write(builds, path) renews the file, after a change that is meant to move the numbers

An entry has the digest of the program that it is of (intermediate.py), so that a kernel that has
not changed need not be compiled again to know that it keeps its budget.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .ahead_of_time import Build
from .listing import TELLING_FAMILIES


def write(builds: Sequence[Build], path: Path, keep: Collection[str] = ()) -> None:
    """Makes what the builds need now the budget, beside the entries with the names to ``keep``."""
    entries = {build.job.id: _entry(build) for build in builds}
    if len(entries) < len(builds):
        raise ValueError("jobs share an id; give them different cases")
    before = _read(path)["kernels"]
    entries |= {name: before[name] for name in keep}
    if too_large := [build.job.id for build in builds if build.occupancy == 0]:
        raise ValueError(f"no multiprocessor holds a block of {', '.join(too_large)}")
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)
    )
    path.write_text(f'{{"triton": "{version("triton")}", "kernels": {{\n{lines}\n}}}}\n')


def compare(builds: Sequence[Build], path: Path, renew: str, partial: bool = False) -> list[str]:
    """Violations, readable, empty if there are none; ``renew`` is the command that renews the file.

    Resources may shrink and occupancy may grow. An entry is missing for a build without one, and
    stale without a build (unless the builds are ``partial``) or when another version of Triton made
    it.
    """
    budgets = _read(path)["kernels"]
    names = {build.job.id for build in builds}
    violations = _of_file(path, names, budgets.keys() & names if partial else budgets.keys())
    for build in builds:
        if build.job.id in budgets:
            violations += _exceeded(build, budgets[build.job.id])
    return _with_advice(violations, renew)


def compare_programs(programs: Mapping[str, str], path: Path, renew: str) -> list[str]:
    """The same without builds: entries that are missing, stale, or of another program."""
    budgets = _read(path)["kernels"]
    violations = _of_file(path, programs.keys(), budgets.keys()) + [
        f"{name}: not the program that {path.name} is of"
        for name in sorted(changed(programs, path) & budgets.keys())
    ]
    return _with_advice(violations, renew)


def changed(programs: Mapping[str, str], path: Path) -> set[str]:
    """The names of programs that the budget is not of: new, changed, or of another Triton."""
    content = _read(path)
    if content["triton"] != version("triton"):
        return set(programs)
    budgets = content["kernels"]
    return {name for name, p in programs.items() if budgets.get(name, {}).get("program") != p}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"triton": None, "kernels": {}}


def _of_file(path: Path, names: Collection[str], budgeted: Collection[str]) -> list[str]:
    """Its violations: of another Triton, or of other kernels than these."""
    triton, now = _read(path)["triton"], version("triton")
    found = [] if triton == now else [f"{path.name} is of triton {triton}, not {now}"]
    found += [f"{name}: missing in {path.name}" for name in sorted(names) if name not in budgeted]
    found += [f"{name}: stale in {path.name}" for name in sorted(budgeted) if name not in names]
    return found


def _with_advice(violations: list[str], renew: str) -> list[str]:
    return violations and [*violations, f"if that is meant: {renew}"]


def _entry(build: Build) -> dict[str, Any]:
    return {
        "program": build.program,
        "at_most": dict(build.resources),
        "blocks_at_least": build.occupancy,
        "in_hot_loop": [name for name in TELLING_FAMILIES if name in build.hot_loop],
        "in_kernel": [name for name in TELLING_FAMILIES if name in build.instructions],
    }


def _exceeded(build: Build, entry: Mapping[str, Any]) -> list[str]:
    name, limits = build.job.id, entry["at_most"]
    found = [
        f"{name}: {resource} {amount}, at most {limits.get(resource, 0)}"
        for resource, amount in build.resources.items()
        if amount > limits.get(resource, 0)
    ]
    if build.occupancy < entry["blocks_at_least"]:
        found.append(
            f"{name}: {build.occupancy} blocks per multiprocessor (limited by {build.limited_by}), "
            f"at least {entry['blocks_at_least']}"
        )
    found += [
        f"{name}: no {f} in the hot loop" for f in entry["in_hot_loop"] if f not in build.hot_loop
    ]
    found += [f"{name}: no {f}" for f in entry["in_kernel"] if f not in build.instructions]
    return found
