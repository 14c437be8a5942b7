"""Instructions of a kernel, its loops, and which of them is hot; for any instruction set."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MATRIX_FAMILIES = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "QGMMA", "DMMA", "v_mfma")
# Families whose loss would go unnoticed by every result: what a budget asks for by name.
TELLING_FAMILIES = (*MATRIX_FAMILIES, "LDGSTS", "UTMALDG", "UBLKCP", "LDSM")


@dataclass(frozen=True)
class Listing:
    """Opcodes in program order. Loops, and what a branch ahead may skip, as (first, last) indices
    of their instructions."""

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    skipped: tuple[tuple[int, int], ...] = ()

    def hottest_loop(self) -> tuple[str, ...]:
        """The innermost loop with the most matrix instructions, or, without any, the longest.

        Loops that wait for a barrier contain no matrix instruction and do not count as inner ones.
        """

        def matrix_instructions(loop: tuple[int, int]) -> int:
            return sum(is_matrix(opcode) for opcode in self.opcodes[loop[0] : loop[1] + 1])

        loops = [loop for loop in self.loops if matrix_instructions(loop)] or list(self.loops)
        inner = [loop for loop in loops if not any(_contains(loop, other) for other in loops)]
        if not inner:
            return ()
        first, last = max(inner, key=lambda loop: (matrix_instructions(loop), loop[1] - loop[0]))
        return self.opcodes[first : last + 1]


def is_matrix(opcode: str) -> bool:
    return family(opcode) in MATRIX_FAMILIES


def family(opcode: str) -> str:
    """HMMA of HMMA.16816.F32.BF16, v_mfma of v_mfma_f32_32x32x8_bf16."""
    if opcode.islower():
        match = re.match(r"[a-z]+_[a-z]+", opcode)
        return match[0] if match else opcode
    return opcode.partition(".")[0]


def histogram(opcodes: Iterable[str]) -> dict[str, int]:
    """Instructions by family, most frequent first."""
    return dict(Counter(map(family, opcodes)).most_common())


def read(
    lines: Iterable[str],
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    branch_target: Callable[[re.Match[str]], str | None],
) -> Listing:
    """A listing of assembly text; a loop is what a branch to an earlier label closes."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in lines:
        if match := label.match(line):
            labels[match[1]] = len(opcodes)
        elif match := instruction.match(line):
            if target := branch_target(match):
                branches.append((len(opcodes), target))
            opcodes.append(match["opcode"])
    spans = [(n, labels[target]) for n, target in branches if target in labels]
    # A branch to itself ends an NVIDIA kernel; nothing runs there.
    loops = tuple((to, n) for n, to in spans if to < n)
    skipped = tuple((n + 1, to - 1) for n, to in spans if to > n + 1)
    return Listing(tuple(opcodes), loops, skipped)


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
