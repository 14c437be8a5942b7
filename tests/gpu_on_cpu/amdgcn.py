"""AMD machine code: the listing and the resources of a kernel, from LLVM's assembly text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .listing import Listing, read

_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\t(?P<opcode>[a-z]\w+)(?:[ \t]+(?P<operands>.*))?$")


def read_amdgcn(text: str) -> Listing:
    return read(_function(text), _LABEL, _INSTRUCTION, _branch_target)


def resources(text: str) -> dict[str, int]:
    """Registers, spills and scratch bytes, from the kernel's metadata."""
    of_metadata = {
        "vgprs": "vgpr_count",
        "agprs": "agpr_count",
        "sgprs": "sgpr_count",
        "vgpr_spills": "vgpr_spill_count",
        "sgpr_spills": "sgpr_spill_count",
        "scratch_bytes": "private_segment_fixed_size",
    }
    return {name: _number(rf"\.{key}:\s+(\d+)", text) for name, key in of_metadata.items()}


def waves_per_simd(text: str) -> int:
    """How many wavefronts the registers leave room for."""
    return _number(r"; Occupancy: (\d+)", text)


def _function(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            return
        yield line.partition(";")[0].rstrip()


def _branch_target(instruction: re.Match[str]) -> str | None:
    branches = instruction["opcode"].startswith(("s_branch", "s_cbranch"))
    return instruction["operands"] if branches else None


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in the assembly text; has its format changed?")
    return int(match[1])
