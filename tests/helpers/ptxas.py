"""What ptxas -v reports of a kernel, whichever compiler calls it."""

from __future__ import annotations

import re


def resources(report: str) -> dict[str, int]:
    """Registers, bytes of spills, and of static shared memory."""
    registers, *_ = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    shared = re.findall(r"(\d+) bytes smem", report)
    return {
        "registers": int(registers),
        "spill_bytes": sum(map(int, spills)),
        "static_shared_bytes": sum(map(int, shared)),
    }
