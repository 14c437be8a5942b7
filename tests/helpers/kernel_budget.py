"""The committed budgets of the Triton kernels: what they compile to, by launch and architecture.

    PYTHONPATH=tests python -m helpers.kernel_budget           compares all with the budget
    PYTHONPATH=tests python -m helpers.kernel_budget --update  renews budgets/triton.json

CI builds a part (``CI``), since all take half an hour on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpu_on_cpu import budget
from gpu_on_cpu.ahead_of_time import TARGETS, Build

from .launches import CASES, HYBRID, Case, build_all

BUDGET = Path(__file__).parents[1] / "budgets" / "triton.json"
RENEW = "PYTHONPATH=tests python -m helpers.kernel_budget --update"

_USUAL = CASES["bf16 64"]
_ATTENTION = replace(_USUAL, calls=HYBRID)
CI: tuple[tuple[str, Case], ...] = (
    ("sm_90", _USUAL),
    ("sm_80", replace(_USUAL, calls=(*HYBRID, "step"))),
    ("sm_100", _ATTENTION),
    ("gfx942", _ATTENTION),
)


def violations(jobs: Sequence[tuple[str, Case]], builds: Sequence[Build]) -> list[str]:
    return budget.compare(builds, BUDGET, RENEW, partial=jobs == CI)


def main(arguments: list[str]) -> int:
    jobs = [(target, case) for case in CASES.values() for target in TARGETS]
    builds = build_all(jobs)
    if arguments == ["--update"]:
        budget.write(builds, BUDGET)
        return 0
    found = violations(jobs, builds)
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
