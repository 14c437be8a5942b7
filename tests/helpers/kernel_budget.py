"""The committed budgets of the Triton kernels: what they compile to, by launch and architecture.

    PYTHONPATH=tests python -m helpers.kernel_budget           compares all with the budget
    PYTHONPATH=tests python -m helpers.kernel_budget --update  renews budgets/triton.json

All is every case of launches.py on every architecture, some 420 kernels; CI builds a part. For
sm_86, which takes what sm_80 does where it fits, it is the cases of which some does not.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from gpu_on_cpu import budget
from gpu_on_cpu.ahead_of_time import TARGETS

from .launches import CASES, HYBRID, Case, build_all

BUDGET = Path(__file__).parents[1] / "budgets" / "triton.json"
RENEW = "PYTHONPATH=tests python -m helpers.kernel_budget --update"

_TIGHT = ("bf16 128x64", "bf16 128x64 exp", "bf16 64x128")  # cases for sm_86
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
    builds = build_all(
        [
            (target, case)
            for case in CASES.values()
            for target in TARGETS
            if target != "sm_86" or case.name in _TIGHT
        ]
    )
    if arguments == ["--update"]:
        budget.write(builds, BUDGET)
        return 0
    found = budget.compare(builds, BUDGET, RENEW)
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
