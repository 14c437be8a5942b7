"""What a launch tells: hazards, traffic, counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum


class Hazard(Enum):
    """Kinds of findings, in the order of the machine's."""

    RACE = "race"
    COPY = "copy in flight"
    ACCUMULATOR = "wgmma registers in flight"
    OPERAND = "wgmma operand in flight"
    FENCE = "no fence.proxy.async"
    UNFINISHED = "never waited for"
    DUPLICATE = "written twice"
    BLOCKS = "blocks conflict"


@dataclass(frozen=True)
class Finding:
    """A hazard: what happened first, and how often by the same instructions."""

    hazard: Hazard
    message: str
    instruction: str
    count: int

    def __str__(self) -> str:
        times = f" [{self.count} times]" if self.count > 1 else ""
        return f"{self.hazard.value}: {self.message}{times}"


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory that a launch moves for one argument, summed over all blocks.

    The first three are what threads ask for. Those named sectors are what memory has to move: 32
    bytes for each sector that a warp's request touches, however little of it.
    """

    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    loaded_sectors: int = 0
    stored_sectors: int = 0
    atomic_sectors: int = 0

    @property
    def requested(self) -> int:
        return self.loaded + self.stored + self.atomic

    @property
    def sectors(self) -> int:
        return self.loaded_sectors + self.stored_sectors + self.atomic_sectors


@dataclass(frozen=True)
class Access:
    """A memory instruction: requests are warps that execute it with at least one thread.

    Wavefronts are passes over the banks of shared memory, in the first block; without conflicts
    they are ``ideal_wavefronts``. Sectors are those of global memory, of all blocks; if the bytes
    lay side by side they would be ``ideal_sectors``.
    """

    instruction: str
    location: str
    looped: bool  # whether it lies in a loop
    requests: int
    sectors: int
    ideal_sectors: int
    wavefronts: int
    ideal_wavefronts: int


@dataclass(frozen=True)
class Report:
    """What a launch did.

    races: hazards within a block, in shared memory or in registers of asynchronous operations.
    duplicates: bytes of shared memory to which two warps write the same value, without a barrier.
        Harmless, but work done twice: Triton does so where a tile is too small for its warps.
    block_conflicts: see ``check_blocks`` of ``PtxKernel``.
    global_bytes: by the index of an argument, for those that are tensors.
    executed: (opcode, executions by a warp) of every instruction, in the order of the program.
    accesses: per memory instruction, in the order of the program.
    """

    races: list[Finding]
    duplicates: list[Finding]
    block_conflicts: list[Finding]
    global_bytes: dict[int, Traffic]
    executed: list[tuple[str, int]]
    accesses: list[Access]

    @property
    def instructions(self) -> Counter[str]:
        """Executions by a warp, per opcode."""
        result: Counter[str] = Counter()
        for opcode, count in self.executed:
            if count:
                result[opcode] += count
        return result

    def assert_clean(self) -> None:
        """Raises AssertionError with all findings, if there are any."""
        findings = [*self.races, *self.block_conflicts]
        assert not findings, "\n".join(map(str, findings))
