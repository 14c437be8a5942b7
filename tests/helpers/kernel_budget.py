"""The committed budgets of the Triton kernels: what they compile to, by launch and architecture.

    PYTHONPATH=tests python -m helpers.kernel_budget           compares all with the budget
    PYTHONPATH=tests python -m helpers.kernel_budget --update  renews budgets/triton.json

All is every case of launches.py on every architecture, some 440 kernels. What is compiled is those
that have changed since the budget was written: half an hour if it is all of them. CI makes sure
that none has, and compiles a part. For sm_86, which takes what sm_80 does where it fits, all is the
cases of which some does not. For sm_75 it is fp16, since there is no hardware for bf16.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from gpu_on_cpu import budget
from gpu_on_cpu.ahead_of_time import TARGETS

from .launches import ALL, CASES, HYBRID, Case, all_programs, build_all

BUDGET = Path(__file__).parents[1] / "budgets" / "triton.json"
RENEW = "PYTHONPATH=tests python -m helpers.kernel_budget --update"

_TIGHT = ("bf16 128x64", "bf16 128x64 exp", "bf16 64x128")  # cases for sm_86
JOBS: tuple[tuple[str, Case], ...] = (
    ("sm_75", replace(CASES["fp16 64"], calls=ALL)),
    *(
        (target, case)
        for case in CASES.values()
        for target in TARGETS
        if target != "sm_75" and (target != "sm_86" or case.name in _TIGHT)
    ),
)
CI: tuple[tuple[str, Case], ...] = tuple(
    (target, replace(CASES[name], calls=calls))
    for target, name, calls in (
        ("sm_90", "bf16 64", ("feature_map", "linear", "hybrid")),
        ("sm_90", "bf16 64", ("step", "steps")),
        ("sm_90", "bf16 64 exp", HYBRID),
        ("sm_80", "bf16 64", ("hybrid", "step")),
        ("sm_100", "bf16 64", HYBRID),
        ("gfx942", "bf16 64", HYBRID),
    )
)


def main(arguments: list[str]) -> int:
    programs = all_programs(JOBS)
    changed = budget.changed(programs, BUDGET)
    print(f"{len(changed)} of {len(programs)} kernels have changed")
    builds = build_all(JOBS, only=changed)
    found = budget.compare_programs(programs, BUDGET, RENEW)
    found += budget.compare(builds, BUDGET, RENEW, partial=True)
    print("\n".join(found))
    if arguments != ["--update"]:
        return int(bool(found))
    budget.write(builds, BUDGET, keep=programs.keys() - changed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
