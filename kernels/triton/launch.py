"""How kernels are launched: tile sizes by shape, and the one place that calls Triton's launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """A launch configuration."""

    chunk: int  # C, tokens of a chunk and keys of a tile
    block_v: int  # columns of V that a program takes
    num_warps: int
    num_stages: int = 2
    resident: bool = True  # feature weights are one tile each, loaded once
    slice: int = 64  # else the columns of x that are projected at a time
    other: int = 0  # quadratic kernels: tokens of a tile that the chunk is paired with
    carried: int = 1  # tiles of a window that a chunk may leave to the next in registers


ARCHITECTURES = ("sm_80", "sm_75", "sm_86", "sm_90", "sm_100", "gfx942")


def architecture() -> str:
    """The column of the tables for the GPU that Triton's active driver compiles for. The
    interpreter takes the first."""
    if triton.knobs.runtime.interpret:
        return ARCHITECTURES[0]
    driver = triton.runtime.driver.active
    return _architecture(driver, driver.get_current_device())


@cache
def _architecture(driver: Any, device: Any) -> str:
    target = driver.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    if target.arch // 10 == 9:
        return "sm_90"
    if target.arch // 10 in (10, 11):
        return "sm_100"
    # A block has 64 KB of shared memory on sm_75, 163 on sm_80 and sm_87, 99 on sm_86, sm_89 and
    # sm_12x.
    if target.arch < 80:
        return "sm_75"
    return "sm_80" if target.arch in (80, 87) else "sm_86"


def precision(dtype: torch.dtype = torch.float32) -> str:
    """The precision of fp32 products: three TF32 products keep fp32's digits on tensor cores, one
    keeps more than those of bf16 activations. Products of 16 bits have none, but AMD's GPUs other
    than gfx942 do not compile with "tf32" in them."""
    if architecture() == "gfx942":
        return "ieee"
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


class Row:
    """The launch configurations of a kernel for head dims and feature widths up to some sizes."""

    def __init__(self, *sizes: tuple[int, int], usual: Tiles, **others: Tiles) -> None:
        self.sizes = sizes  # pairs (D, f), each rounded up to a tile; f = 0 without maps
        self.usual = usual
        self.others = others  # by architecture

    def fits(self, head_dim: int, width: int) -> bool:
        return any(head_dim <= d and width <= f for d, f in self.sizes)

    def on(self, architecture: str) -> Tiles:
        if architecture == "sm_86" and architecture not in self.others:
            architecture = "sm_80"
        return self.others.get(architecture, self.usual)


SMALL, MIDDLE, LARGE, ANY = (64, 64), ((128, 64), (64, 128)), (128, 128), (256, 256)
# Weights of up to 128 x 64 or 64 x 128 may stay with the program, in shared memory; two parts of
# larger ones would fill it.
PLAIN, WIDE_PLAIN = (128, 0), (256, 0)  # q and k are the features

# Operands lie in registers on AMD, where weights that stay would spill.
_AMD_BACKWARD = Tiles(16, 32, 4, 1, resident=False, slice=32)
_AMD_FORWARD = Tiles(32, 64, 4, 1, resident=False, slice=32)
_READ_MAPS = Tiles(64, 64, 4, 1, resident=False, slice=32)  # there, and where 99 KB hold too little
_ALL_COLUMNS = Tiles(32, 128, 8, 1, carried=2)
_LARGE_MAP = Tiles(32, 128, 4, 1, resident=False)
_LARGE_ENTROPY = Tiles(32, 128, 4, 1, resident=False, other=32)
_LARGE_PAIRS = Tiles(32, 256, 4, 1, resident=False, other=32)

# By kernel and by the dtype that it computes in; the first row that fits is taken. What the
# configurations need on each architecture is in tests/budgets/, renewed by
# ``python -m helpers.kernel_budget``. Where they are from:
# - bf16, f up to 64, forward with D up to 128 and backward with D up to 64, on sm_80 and sm_90: the
#   busiest pipe is busy for the least time by the static model (docs/gpu_model.md), spilled
#   registers included. But backward on sm_80 carries tiles, which by the model takes 2 % longer:
#   it moves half of the bytes.
# - backward with D = 128, some wider kernels and some without maps, on sm_90: measured
#   (docs/gpu_h100.md), backward before it carried two tiles. sm_80 has the same backward: by the
#   model faster or slower, by the case, for a fifth of the bytes.
# - sm_86: sm_80's where they fit. sm_75: the last row. sm_100: the usual ones.
# - All others, neither modelled nor measured: those that spill least at the same work.
# Where ptxas finds no allocation for what is too large, it falls back on 32 registers and thousands
# of bytes of stack: wide maps are projected 32 columns of x at a time.
TABLE = {
    ("forward", "bf16"): (
        # For windows of 64, chunks of 64 read q, k and v once.
        Row(SMALL, usual=Tiles(64, 64, 4, 1), gfx942=_READ_MAPS),
        Row(PLAIN, usual=Tiles(32, 64, 4, 1), sm_90=Tiles(128, 128, 8, 1)),
        Row(WIDE_PLAIN, usual=Tiles(16, 64, 4, 1), sm_90=Tiles(64, 128, 8, 1)),
        Row((128, 64), usual=Tiles(64, 64, 4, 1), sm_86=_READ_MAPS, gfx942=_READ_MAPS),
        Row((64, 128), usual=Tiles(32, 64, 8, 1), gfx942=_AMD_FORWARD),
        Row(
            LARGE,
            usual=Tiles(32, 64, 4, 1, resident=False),
            sm_90=Tiles(64, 128, 8, 1, resident=False),
        ),
        Row(
            (256, 64),
            usual=Tiles(16, 64, 4, 1, resident=False),
            sm_90=Tiles(64, 64, 4, 1, resident=False),
        ),
        Row(ANY, usual=Tiles(16, 64, 8, 1, resident=False, slice=32)),
    ),
    ("forward", "fp32"): (
        Row(SMALL, usual=Tiles(32, 64, 4, 1)),
        Row(ANY, usual=Tiles(16, 32, 4, 1, resident=False, slice=32)),
    ),
    # Eight warps would spill less, but hold, and compute, tiles of 64 rows twice.
    ("backward", "bf16"): (
        # Larger tiles would spill thousands of registers, or half of what AMD has.
        Row(
            SMALL,
            usual=Tiles(64, 64, 4, 1),
            sm_80=Tiles(32, 64, 4, 1, carried=3),
            gfx942=_AMD_BACKWARD,
        ),
        Row(PLAIN, usual=Tiles(32, 64, 8, 1), sm_90=Tiles(64, 128, 4, 1)),
        Row(
            WIDE_PLAIN,
            usual=Tiles(16, 64, 8, 1),
            # With more columns ptxas gives up, and leaves 32 registers and 8 KB of stack.
            sm_80=Tiles(16, 32, 8, 1),
            sm_90=Tiles(16, 128, 8, 1),
        ),
        Row(
            (128, 64),
            usual=Tiles(64, 64, 4, 1),
            # One program for all columns of V reads q, k and do once.
            sm_80=_ALL_COLUMNS,
            sm_90=_ALL_COLUMNS,
            # With resident weights that would want 115 KB, and this one block instead of two.
            sm_86=Tiles(32, 64, 4, 1, resident=False, carried=2),
            gfx942=_AMD_BACKWARD,
        ),
        Row(
            (64, 128),
            usual=Tiles(32, 64, 8, 1, resident=False, slice=32),
            gfx942=_AMD_BACKWARD,
        ),
        Row(
            LARGE,
            usual=Tiles(32, 64, 8, 1, resident=False),
            sm_90=Tiles(64, 128, 8, 1, resident=False),
        ),
        Row((256, 64), usual=Tiles(16, 64, 8, 1, resident=False)),
        Row(ANY, usual=Tiles(16, 32, 8, 1, resident=False, slice=32)),
    ),
    ("backward", "fp32"): (
        Row(SMALL, usual=Tiles(32, 64, 8, 1)),
        Row(ANY, usual=Tiles(16, 32, 8, 1, resident=False, slice=32)),
    ),
    # Steps of a few tokens: a chunk is a query. Four warps would spill the weights of wide maps.
    ("decode", "bf16"): (
        Row(SMALL, usual=Tiles(1, 32, 4, 1)),
        Row(*MIDDLE, usual=Tiles(1, 32, 8, 1)),
        Row(ANY, usual=Tiles(1, 32, 8, 1, resident=False)),
    ),
    ("decode", "fp32"): (
        Row(SMALL, usual=Tiles(1, 32, 4, 1)),
        Row(ANY, usual=Tiles(1, 32, 8, 1, resident=False, slice=32)),
    ),
    # Of many tokens.
    ("prompt", "bf16"): (
        Row(SMALL, usual=Tiles(32, 64, 4, 1)),
        Row((128, 64), usual=Tiles(32, 64, 8, 1), gfx942=_AMD_FORWARD),
        # Resident weights would want 104 KB there.
        Row(
            (64, 128),
            usual=Tiles(32, 64, 8, 1),
            sm_86=Tiles(32, 64, 8, 1, resident=False),
            gfx942=_AMD_FORWARD,
        ),
        Row(LARGE, usual=Tiles(32, 64, 8, 1, resident=False)),
        Row(ANY, usual=Tiles(16, 64, 8, 1, resident=False)),
    ),
    # Split operands of larger tiles leave neither shared memory nor registers.
    ("prompt", "fp32"): (
        Row(SMALL, usual=Tiles(16, 32, 4, 1, resident=False, slice=32)),
        Row(ANY, usual=Tiles(16, 32, 8, 1, resident=False, slice=32)),
    ),
    # Quadratic: chunks of queries (or keys) against tiles of ``other`` keys (or queries). Features
    # and their gradients leave few registers for tiles of 64.
    ("teacher", "bf16"): (
        Row(SMALL, *MIDDLE, usual=Tiles(128, 128, 8, 2, other=64)),
        Row(LARGE, usual=Tiles(32, 128, 4, 1, resident=False, other=32)),
        Row(ANY, usual=Tiles(16, 128, 4, 1, resident=False, other=16)),
    ),
    ("teacher_entropy", "bf16"): (
        Row(SMALL, usual=Tiles(128, 128, 8, 2, other=64), sm_80=Tiles(128, 128, 8, 2, other=32)),
        Row((64, 128), usual=Tiles(128, 128, 8, 2, other=64), sm_80=_LARGE_ENTROPY),
        Row((128, 64), usual=Tiles(128, 128, 8, 2, other=32), sm_80=_LARGE_ENTROPY),
        Row(LARGE, usual=_LARGE_ENTROPY),
        Row(ANY, usual=Tiles(16, 128, 4, 1, resident=False, other=16)),
    ),
    ("entropy", "bf16"): (  # V is not read
        Row(SMALL, usual=Tiles(128, 256, 8, 2, other=32)),
        Row((128, 64), usual=Tiles(128, 256, 8, 2, other=32), sm_80=_LARGE_PAIRS),
        Row(LARGE, usual=_LARGE_PAIRS),
        Row(ANY, usual=Tiles(16, 256, 4, 1, resident=False, other=16)),
    ),
    **{
        (kernel, "fp32"): (
            Row(SMALL, usual=Tiles(32, block_v, 4, 1, other=32)),
            Row(LARGE, usual=Tiles(32, block_v, 4, 1, resident=False, other=32)),
            Row(ANY, usual=Tiles(16, block_v, 4, 1, resident=False, other=16)),
        )
        for kernel, block_v in (("teacher", 128), ("teacher_entropy", 128), ("entropy", 256))
    },
    ("feature_map", "bf16"): (
        # Without wgmma weights lie in registers.
        Row(SMALL, usual=Tiles(128, 128, 8, 2), sm_80=Tiles(64, 128, 4, 2), gfx942=_LARGE_MAP),
        Row(*MIDDLE, usual=Tiles(128, 128, 8, 2), sm_80=_LARGE_MAP, gfx942=_LARGE_MAP),
        Row(LARGE, usual=_LARGE_MAP),
        Row(ANY, usual=Tiles(16, 128, 4, 1, resident=False)),
    ),
    ("feature_map", "fp32"): (
        Row(SMALL, usual=Tiles(32, 128, 4, 1)),
        Row(LARGE, usual=Tiles(32, 128, 4, 1, resident=False)),
        Row(ANY, usual=Tiles(16, 128, 4, 1, resident=False)),
    ),
}


# Segments make work for idle multiprocessors, but each is begun with a pass over the tokens before,
# and has a state and shares of gradients in memory. Of packed sequences each has as many segments
# as the tokens of all, of which most have nothing to do.
SEGMENT_CHUNKS = 16
ENOUGH_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100
MOST_PROGRAMS = 8 * ENOUGH_PROGRAMS  # enough where one in eight has work


def segment_chunks(chunks: int, programs: int) -> int:
    """The chunks of a segment: all, where there are programs enough without dividing sequences."""
    if programs >= ENOUGH_PROGRAMS or chunks <= SEGMENT_CHUNKS:
        return max(chunks, 1)
    return max(SEGMENT_CHUNKS, -(-chunks // (MOST_PROGRAMS // max(programs, 1))))


def tiles_for(kernel: str, q: Tensor, weight: Tensor | None, v: Tensor) -> Tiles:
    """The launch configuration of a kernel (a name of TABLE) for the shapes of a call."""
    head_dim, value_dim = q.shape[3], v.shape[3]
    width = 0 if weight is None else weight.shape[2]
    # fp16 is computed in fp32 (arguments.arithmetic_of), but for what has no features.
    narrow = q.dtype == torch.bfloat16 or (q.dtype == torch.float16 and kernel == "teacher")
    dtype = "bf16" if narrow else "fp32"
    return _tiles(kernel, dtype, head_dim, width, value_dim, architecture())


@cache
def _tiles(
    kernel: str, dtype: str, head_dim: int, width: int, value_dim: int, architecture: str
) -> Tiles:
    size = next_power_of_2(head_dim), next_power_of_2(width) if width else 0
    rows = TABLE[kernel, dtype]
    # What does for the widest heads leaves room for others in the 64 KB of sm_75.
    row = rows[-1] if architecture == "sm_75" else next(row for row in rows if row.fits(*size))
    tiles = row.on(architecture)
    return replace(tiles, block_v=min(tiles.block_v, next_power_of_2(value_dim)))


# The quadratic backward kernels: every program leaves a share of the parameters' gradients.
ENOUGH_SHARES = 8 * 132
# Programs of packed sequences, whose lengths the host does not know: most may have nothing to do.
ENOUGH_UNEQUAL = 4096


def segment_count(kernel: str, chunks: int, programs: int, unequal: bool) -> int:
    """How many programs of a quadratic kernel share a sequence, where ``programs`` is their number
    with one for each sequence, head and slice; ``unequal`` if ``chunks`` is a bound of all
    sequences together."""
    if kernel == "entropy":
        return max(1, min(chunks, -(-ENOUGH_SHARES // max(programs, 1))))
    return max(1, min(chunks, ENOUGH_UNEQUAL // max(programs, 1)) if unequal else chunks)


def step_tiles(q: Tensor, weight: Tensor, v: Tensor, programs: int, decoded: bool) -> Tiles:
    """The launch configuration of hybrid_attention_step_; ``programs`` for one slice of V."""
    if not decoded:
        return tiles_for("prompt", q, weight, v)
    tiles = tiles_for("decode", q, weight, v)
    # A step is over when its slowest program is: few states are cut into narrow slices.
    block_v = tiles.block_v
    while block_v > 16 and programs * v.shape[3] // block_v < ENOUGH_PROGRAMS // 2:
        block_v //= 2
    return replace(tiles, block_v=block_v)


def next_power_of_2(n: int) -> int:
    """The tile that holds n columns; products need tiles of at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options)."""
    if 0 not in grid:
        _run(kernel, grid, args, options)


@contextmanager
def compiling() -> Iterator[set[str]]:
    """Within it launches are compiled for the current device, and not run. Yields the names of the
    kernels. It is the process that changes: other threads must not launch meanwhile."""
    global _run
    names = set()

    def compile_only(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict) -> None:
        kernel.warmup(*args, grid=grid, **options)
        names.add(kernel.fn.__name__)

    before, _run = _run, compile_only
    try:
        yield names
    finally:
        _run = before


def _triton(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    kernel[grid](*args, **options)


_run: Callable[..., None] = _triton
