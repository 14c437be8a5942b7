"""Cycles that a trip through a kernel's hot loop takes, from its machine code: to compare variants.

Each instruction occupies one execution pipe of a multiprocessor for a known time. If the pipes
overlap perfectly, a trip takes as long as the busiest one; if they do not overlap at all, as long
as all of them together. Latencies, barriers and bank conflicts are not in the model, nor what wgmma
reads from shared memory; they may take longer still.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from .ahead_of_time import Build
from .listing import Listing, family, is_matrix

LABEL = "MODEL, not measured"


@dataclass(frozen=True)
class Multiprocessor:
    """Throughput per clock, how many there are on a GPU, its clock and bandwidth.

    fp32, integer and special: results, "Throughput of Native Arithmetic Instructions" in the CUDA
        C++ Programming Guide. special are rcp, rsqrt, ex2, lg2, sin, cos and the conversions that
        the table calls "all other".
    tensor_flop: of dense bf16, from the peak, clock and number of SMs in the A100 and H100 white
        papers (312 TFLOP/s at 1.41 GHz on 108; 989 at 1.83 on 132).
    bandwidth: of the A100 80 GB and the H100 SXM5, from the same papers.
    """

    name: str
    count: int
    clock: float
    bandwidth: float

    fp32: int
    integer: int
    special: int
    tensor_flop: int
    l1_bytes: int = 128
    issued_warps: int = 4  # one per scheduler

    @property
    def memory_bytes(self) -> float:
        """Its share of the bandwidth, per clock."""
        return self.bandwidth / self.clock / self.count


MULTIPROCESSORS = {
    "sm_80": Multiprocessor("A100 80 GB", 108, 1.41e9, 2.04e12, 64, 64, 16, 2048),
    "sm_90": Multiprocessor("H100 SXM5", 132, 1.83e9, 3.35e12, 128, 64, 16, 4096),
}

_MATRIX_PTX = ("mma.sync", "wgmma.mma_async")
_FMA = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2"}
_SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND"}
_INTEGER = {
    *("FSEL", "FMNMX", "FMNMX3", "FSETP", "FSET", "F2FP", "I2FP"),  # run where integers do
    *("IADD3", "VIADD", "IABS", "IMNMX", "VIMNMX", "ISETP", "LEA", "LOP3", "PLOP3", "SHF", "SGXT"),
    *("MOV", "SEL", "PRMT", "POPC", "CS2R", "HMNMX2"),
}
# Shared memory and the L1 cache are one memory with one data path.
_L1_BY_WIDTH = {"LDS", "STS", "LDGSTS", "LDG", "STG", "LDL", "STL"}
_L1_BY_MATRICES = {"LDSM", "STSM"}

_WARP = 32
_HMMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


@dataclass(frozen=True)
class Prediction:
    """Cycles of one trip through the hot loop of one block.

    pipes: cycles by pipe, "memory" among them if the bytes of a trip were given.
    overlapped: the busiest pipe's alone; serialised: those of all pipes one after another.
    """

    job: str
    pipes: Mapping[str, float]

    @property
    def busiest(self) -> str:
        return max(self.pipes, key=lambda pipe: self.pipes[pipe])

    @property
    def overlapped(self) -> float:
        return self.pipes[self.busiest]

    @property
    def serialised(self) -> float:
        return sum(self.pipes.values())

    def __str__(self) -> str:
        pipes = ", ".join(f"{pipe} {cycles:.0f}" for pipe, cycles in self.pipes.items())
        return (
            f"{self.job}: {self.overlapped:.0f} to {self.serialised:.0f} cycles per trip, "
            f"{self.busiest} the busiest ({pipes}) [{LABEL}]"
        )


def predict(build: Build, bytes_per_trip: float = 0.0) -> Prediction:
    """The model of a build's hot loop, for sm_80 and sm_90.

    bytes_per_trip: what one block moves from and to DRAM in a trip.
    """
    if not build.hot_loop_opcodes:
        raise ValueError(f"{build.job.id} has no loop")
    trip, warps = Counter(build.hot_loop_opcodes), build.threads // _WARP
    return Prediction(build.job.id, pipes_of(trip, build.job.target, warps, bytes_per_trip))


def pipes_of(
    executed: Mapping[str, float], target: str, warps: int, bytes_moved: float = 0.0
) -> dict[str, float]:
    """Cycles that a block of so many warps, each of which executes these opcodes so often, needs of
    each pipe."""
    if target not in MULTIPROCESSORS:
        raise ValueError(f"no throughputs of {target}: {', '.join(MULTIPROCESSORS)}")
    sm = MULTIPROCESSORS[target]

    def total(amount: Callable[[str], float]) -> float:
        return warps * sum(amount(opcode) * times for opcode, times in executed.items())

    def results(families: set[str]) -> float:
        return total(lambda opcode: _WARP if family(opcode) in families else 0)

    pipes = {
        "tensor": total(_tensor_flop) / sm.tensor_flop,
        "special": results(_SPECIAL) / sm.special,
        "fma": results(_FMA) / sm.fp32,
        "integer": results(_INTEGER) / sm.integer,
        "l1": total(_l1_bytes) / sm.l1_bytes,
        "issue": total(lambda opcode: 1) / sm.issued_warps,
    }
    if bytes_moved:
        pipes["memory"] = bytes_moved / sm.memory_bytes
    return pipes


def trip(listing: Listing, executed: Sequence[tuple[str, int]]) -> tuple[Counter[str], int]:
    """How often each opcode is executed in a trip through the outermost loop with the most matrix
    instructions; and how many trips there were, summed over the warps.

    executed: of the instructions of the kernel's PTX, in their order, opcode and number
        (``Report.executed``). Matrix instructions tell how many trips the inner loops make in one
        of the outer, shuffles how often what a branch may skip is executed. Loops and branches
        without any count once.
    """
    matrices = [n for n, opcode in enumerate(listing.opcodes) if is_matrix(opcode)]
    executions = [n for opcode, n in executed if opcode.startswith(_MATRIX_PTX)]
    if len(matrices) != len(executions) or not matrices:
        raise ValueError(f"{len(matrices)} matrix instructions, executions of {len(executions)}")
    times = dict(zip(matrices, executions, strict=True))
    loops = [loop for loop in listing.loops if any(loop[0] <= n <= loop[1] for n in matrices)]

    def around(n: int) -> tuple[int, int]:
        """The innermost loop around an instruction."""
        return min((x for x in loops if x[0] <= n <= x[1]), key=lambda x: x[1] - x[0])

    inside = [n for n in matrices if any(first <= n <= last for first, last in loops)]
    first_in = {around(n): n for n in reversed(inside)}
    outer = max(loops, key=lambda x: (sum(x[0] <= n <= x[1] for n in matrices), x[1] - x[0]))
    trips = times[first_in[outer]]
    rare = _times_of_skipped(listing, executed)
    result: Counter[str] = Counter()
    for n in range(outer[0], outer[1] + 1):
        own = times[first_in.get(around(n), first_in[outer])]
        skipped = [rare[span] for span in rare if span[0] <= n <= span[1]]
        result[listing.opcodes[n]] += min([own, *skipped]) / trips
    return result, trips


def _times_of_skipped(
    listing: Listing, executed: Sequence[tuple[str, int]]
) -> dict[tuple[int, int], int]:
    """How often what a branch may skip is executed: as often as the only stretch of the PTX, all of
    it executed equally often, that has as many shuffles. Of what has some, but no matrix
    instructions."""
    stretches: dict[int, list[int]] = {}
    for times, group in groupby(executed, key=lambda each: each[1]):
        opcodes = [opcode for opcode, _ in group]
        if not any(opcode.startswith(_MATRIX_PTX) for opcode in opcodes):
            shuffles = sum(opcode.startswith("shfl.") for opcode in opcodes)
            stretches.setdefault(shuffles, []).append(times)
    result = {}
    for first, last in listing.skipped:
        opcodes = listing.opcodes[first : last + 1]
        shuffles = sum(family(opcode) == "SHFL" for opcode in opcodes)
        found = stretches.get(shuffles, ())
        if shuffles and len(found) == 1 and not any(map(is_matrix, opcodes)):
            result[first, last] = found[0]
    return result


def _tensor_flop(opcode: str) -> float:
    """Of one warp, at the rate of bf16: tf32 counts twice, because it runs at half of it."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        rows, columns, depth = map(int, match.groups())
        rows //= 4  # four warps share one
    elif match := re.match(r"HMMA\.(\d+)", opcode):
        rows, columns, depth = _HMMA_SHAPES[match[1]]
    elif is_matrix(opcode):
        raise ValueError(
            f"no rate of {opcode}: HMMA and HGMMA of 16-bit and tf32 operands have one"
        )
    else:
        return 0
    return 2 * rows * columns * depth * (2 if "TF32" in opcode else 1)


def _l1_bytes(opcode: str) -> int:
    """Of one warp, without bank conflicts."""
    name = family(opcode)
    if name in _L1_BY_WIDTH:
        widths = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}
        return _WARP * next((width for suffix, width in widths.items() if suffix in opcode), 4)
    if name in _L1_BY_MATRICES:  # of 8 x 8 16-bit elements
        return 128 * next((count for count in (4, 2) if f".{count}" in opcode), 1)
    return _WARP * 4 if name == "SHFL" else 0
