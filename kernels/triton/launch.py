"""How kernels are launched: tile sizes by shape, and the one place that calls Triton's launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
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


def precision(dtype: torch.dtype = torch.float32) -> str:
    """The precision of fp32 products: three TF32 products keep fp32's digits on tensor cores, one
    keeps more than those of bf16 activations."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


# Segments make work for idle multiprocessors, but each is begun with a pass over the tokens before.
SEGMENT_CHUNKS = 16
ENOUGH_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100


def segment_chunks(chunks: int, programs: int) -> int:
    """The chunks of a segment: all, where there are programs enough without dividing sequences."""
    if programs >= ENOUGH_PROGRAMS or chunks <= SEGMENT_CHUNKS:
        return max(chunks, 1)
    return SEGMENT_CHUNKS


def tiles_for(kernel: str, q: Tensor, weight: Tensor | None, v: Tensor) -> Tiles:
    """The launch configuration of a kernel, "forward" or "backward", for the shapes of a call.

    Or of a quadratic one: "teacher", "teacher_entropy" or "entropy" (its backward).
    """
    head_dim, value_dim = next_power_of_2(q.shape[3]), next_power_of_2(v.shape[3])
    width = head_dim if weight is None else next_power_of_2(weight.shape[2])
    resident = head_dim * width <= 128 * 64
    if kernel in ("forward", "backward"):
        chunk = 32 if max(head_dim, width) <= 128 else 16
        if q.dtype != torch.bfloat16 and max(head_dim, width) > 64:
            # Three products of TF32 split their operands: larger tiles do not fit an A100.
            warps = 8 if kernel == "backward" else 4
            return Tiles(16, min(value_dim, 32), warps, 1, resident=False, slice=32)
        # Backward, twice the warps spill a quarter of the registers that four do.
        return Tiles(chunk, min(value_dim, 64), 8 if kernel == "backward" else 4, 1, resident)
    block_v = value_dim if kernel == "entropy" else min(value_dim, 128)
    # fp16 is only fast without features, whose products are fp32 (arguments.arithmetic_of).
    narrow = q.dtype == torch.bfloat16 or (q.dtype == torch.float16 and kernel == "teacher")
    if narrow and max(head_dim, width) <= 128 and resident:
        # Features and their gradients leave few registers for a tile of 64.
        large = kernel == "teacher" or (kernel == "teacher_entropy" and head_dim <= 64)
        return Tiles(128, block_v, 8, 2, resident, other=64 if large else 32)
    tile = 32 if max(head_dim, width) <= 128 else 16
    if not narrow:  # the parts of resident fp32 weights would fill shared memory
        resident = head_dim * width <= 64 * 64
    return Tiles(tile, block_v, 4, 1, resident, other=tile)


# The quadratic backward kernels: every program leaves a share of the parameters' gradients.
ENOUGH_SHARES = 8 * 132


def shares(kernel: str, chunks: int, programs: int, unequal: bool) -> int:
    """How many programs of a quadratic kernel share a sequence, where ``programs`` is their number
    with one for each sequence, head and slice; ``unequal`` if ``chunks`` is a bound of all
    sequences together."""
    if kernel == "entropy":
        return max(1, min(chunks, -(-ENOUGH_SHARES // max(programs, 1))))
    return max(1, min(chunks, 4096 // max(programs, 1)) if unequal else chunks)


def step_tiles(q: Tensor, weight: Tensor, v: Tensor, programs: int, decoded: bool) -> Tiles:
    """The launch configuration of hybrid_attention_step_; ``programs`` for one slice of V."""
    tiles = tiles_for("forward", q, weight, v)
    if next_power_of_2(q.shape[3]) * next_power_of_2(weight.shape[2]) > 64 * 64:
        tiles = replace(tiles, num_warps=8)  # four would spill the weights of the two maps
    if not decoded:
        if q.dtype == torch.bfloat16:
            return tiles
        # tf32x3 splits its operands in two: small tiles, or shared memory and registers run out.
        block_v = min(tiles.block_v, 32)
        return replace(tiles, chunk=16, block_v=block_v, resident=False, slice=32)
    # A step is over when its slowest program is: few states are cut into narrow slices.
    block_v = min(tiles.block_v, 32)
    while block_v > 16 and programs * v.shape[3] // block_v < ENOUGH_PROGRAMS // 2:
        block_v //= 2
    return replace(tiles, chunk=1, block_v=block_v)


def next_power_of_2(n: int) -> int:
    """The tile that holds n columns; products need tiles of at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options)."""
    if 0 not in grid:
        _run(kernel, grid, args, options)


def _triton(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    kernel[grid](*args, **options)


_run: Callable[..., None] = _triton
