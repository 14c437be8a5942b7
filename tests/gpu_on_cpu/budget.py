"""Holds builds to the numbers of a committed file: what tests cannot see, a kernel may still lose.

python -m pytest ... fails with        forward sm_90 w4 s2: registers 168, at most 128
write(builds, path) renews the file, after a change that is meant to move the numbers
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .ahead_of_time import Build
from .listing import TELLING_FAMILIES


def write(builds: Sequence[Build], path: Path) -> None:
    """Makes what the builds need now the budget."""
    entries = {build.job.id: _entry(build) for build in sorted(builds, key=lambda b: b.job.id)}
    if len(entries) < len(builds):
        raise ValueError("jobs share an id; give them different cases")
    if too_large := [build.job.id for build in builds if build.occupancy == 0]:
        raise ValueError(f"no multiprocessor holds a block of {', '.join(too_large)}")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(e)}" for name, e in entries.items())
    path.write_text(f'{{"triton": "{version("triton")}", "kernels": {{\n{lines}\n}}}}\n')


def compare(builds: Sequence[Build], path: Path, renew: str, partial: bool = False) -> list[str]:
    """Violations, readable, empty if there are none; ``renew`` is the command that renews the file.

    Resources may shrink and occupancy may grow. An entry is missing for a build without one, and
    stale without a build (unless the builds are ``partial``) or when another version of Triton made
    it.
    """
    content = json.loads(path.read_text()) if path.exists() else {"triton": None, "kernels": {}}
    budgets = content["kernels"]
    violations = []
    if content["triton"] != version("triton"):
        violations.append(f"{path.name} is of triton {content['triton']}, not {version('triton')}")
    for build in builds:
        if build.job.id in budgets:
            violations += _exceeded(build, budgets[build.job.id])
        else:
            violations.append(f"{build.job.id}: missing in {path.name}")
    names = set(budgets) if partial else {build.job.id for build in builds}
    violations += [f"{name}: stale in {path.name}" for name in budgets if name not in names]
    if violations:
        violations.append(f"if that is meant: {renew}")
    return violations


def _entry(build: Build) -> dict[str, Any]:
    return {
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
