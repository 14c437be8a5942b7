"""Tensors as the kernels take them, and how a problem is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import next_power_of_2
from .problem import (
    IDENTITY,
    SLIDING,
    Arithmetic,
    Map,
    Problem,
    Rows,
    Sequences,
    Window,
)

# A call has some forty constants, and Triton finds its kernel by hashing and comparing them: the
# same objects are taken again, which are equal without being compared. 1, 1.0 and True differ.
constant = lru_cache(maxsize=4096, typed=True)(tl.constexpr)


@dataclass(frozen=True)
class Plan:
    """A problem, and how many programs with which options solve it."""

    problem: Problem
    tiles: launch.Tiles
    sequences: int  # N
    heads: int
    segments: int
    slices: int

    @property
    def programs(self) -> int:
        return self.sequences * self.heads * self.segments * self.slices

    @property
    def padded(self) -> bool:
        """Whether tokens may belong to no sequence, so that nothing is written for them."""
        return self.problem.sequences.bounds is not None or self.problem.sequences.index is not None

    def run(self, kernel: Any, *args: Any) -> None:
        """Launches a kernel whose first argument is the problem, a program for each place."""
        options = {"num_warps": self.tiles.num_warps, "num_stages": self.tiles.num_stages}
        launch.launch(kernel, (self.programs,), self.problem, *args, **options)


# Tokens of a tile at most, but that of the sinks. Its rows are told apart in 32 bits.
MOST_TOKENS = 128
# Windows of more tokens are as large as can be: sums of two positions stay within 32 bits.
WIDEST = 2**29


def contiguous(name: str, x: Tensor) -> Tensor:
    """x, which a kernel writes in place or reads by no strides.

    Raises:
        ValueError: it is not contiguous.
    """
    if not x.is_contiguous():
        raise ValueError(f"Triton kernels: {name} must be contiguous, its strides are {x.stride()}")
    return x


def rows(x: Tensor, tile: int = MOST_TOKENS) -> Rows:
    """x [B, H, T, width], of which tiles have at most ``tile`` tokens.

    Raises:
        ValueError: its last dimension is not contiguous, or its tokens lie too far apart.
    """
    width = x.shape[3]
    token, farthest = x.stride(2) if x.shape[2] > 1 else width, 2**31 // tile
    if (x.stride(3) != 1 and width > 1) or token > farthest:
        raise ValueError(
            f"Triton kernels: {list(x.shape)} has strides {x.stride()}, needs 1 in the last "
            f"dimension and at most {farthest} between tokens"
        )
    return Rows(x, x.stride(0), x.stride(1), constant(token), constant(width))


def feature_map_of(
    weight: Tensor | None,
    bias: Tensor | None,
    heads: int,
    head_dim: int,
    codes: tuple[int, bool, bool, float],
    tiles: launch.Tiles,
) -> Map:
    """The map of ``heads`` heads; without a weight, the identity."""
    activation, two_sided, skip, eps = codes
    width = head_dim if weight is None else weight.shape[2]
    return Map(
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        eps,
        constant(1 if weight is None else heads // weight.shape[0]),
        constant(IDENTITY.value if weight is None else activation),
        constant(two_sided and weight is not None),
        constant(skip),
        constant(head_dim),
        constant(width),
        constant(next_power_of_2(width)),
        constant(tiles.resident),
        constant(min(tiles.slice, next_power_of_2(head_dim))),
    )


def sequence_count(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """N of packed sequences, or B."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequences_of(q: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Sequences:
    """The sequences of q's tokens. Nothing here waits for the device."""
    batch, _, length, _ = q.shape
    if mask is None:
        bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
        return Sequences(length, bounds, None, None)
    position = mask.cumsum(1) - 1
    tokens = torch.arange(length, dtype=torch.int32, device=q.device).expand(batch, length)
    # Padded tokens write into a column of their own, which nothing reads.
    index = torch.empty(batch, length + 1, dtype=torch.int32, device=q.device)
    index.scatter_(1, position.masked_fill(~mask, length), tokens)
    return Sequences(length, None, index[:, :length].contiguous(), mask.sum(1, dtype=torch.int32))


@cache
def window_of(size: int, kind: int, sink: int, chunk: int, most: int) -> Window:
    """A window, for chunks of ``chunk`` tokens that carry at most ``most`` tiles."""
    if size == 0:
        older, near_linear, far_linear = 0, True, False
    elif kind == SLIDING.value:
        older = -(-(size - 1) // chunk)
        near_linear, far_linear = size < chunk or older == 0, True
    else:
        # The last chunk of a terrace reaches back farthest. Other terraces begin within tiles.
        whole = chunk % size == 0 or size % chunk == 0
        older = max(2 * size // chunk - 1, 1) if whole else None
        near_linear, far_linear = size < chunk, size % chunk != 0
    carried = older if older is not None and older <= most else 0
    return Window(
        *map(constant, (size, kind, sink, next_power_of_2(max(sink, 1)))),
        *map(constant, (carried, carried != older, near_linear, far_linear)),
    )


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """bf16 is computed in bf16; fp16 in fp32, since sums of features outgrow its range."""
    if dtype == torch.bfloat16:
        return Arithmetic(constant(tl.bfloat16), constant(launch.precision(dtype)))
    return Arithmetic(constant(tl.float32), constant(launch.precision()))


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    window: tuple[int, int, int] = (0, 0, 0),
    scale: float,
    affine: bool = False,
    codes: tuple[int, bool, bool, float],
    tiles: launch.Tiles,
    state_heads: int | None = None,
) -> Plan:
    """The arguments of an operator as those of the kernels, cut as ``tiles`` say.

    There are programs for every query head, or for every state head.
    """
    query_heads, length, head_dim = q.shape[1:]
    heads = query_heads if state_heads is None else state_heads
    sequences = sequence_count(q, cu_seqlens)
    chunks = -(-length // tiles.chunk)
    slices = -(-v.shape[3] // tiles.block_v)
    size, kind, sink = window
    if state_heads is None:  # a pool has the sinks that it has
        sink = min(sink, next_power_of_2(length))
    segment_chunks = launch.segment_chunks(chunks, sequences * heads * slices)
    segments = max(1, -(-chunks // segment_chunks))
    window_and_sinks = window_of(min(size, WIDEST), kind, sink, tiles.chunk, tiles.carried)
    most = max(MOST_TOKENS, window_and_sinks.sink_block.value)
    problem = Problem(
        rows(q),
        rows(k, most),
        rows(v, most),
        feature_map_of(weight_q, bias_q, query_heads, head_dim, codes, tiles),
        feature_map_of(weight_k, bias_k, heads, head_dim, codes, tiles),
        None if gate is None else gate.contiguous(),
        scale,
        sequences_of(q, cu_seqlens, key_padding_mask),
        window_and_sinks,
        arithmetic_of(q.dtype),
        constant(affine and (size > 0 or sink > 0)),  # else all weights have the factor
        constant(heads),
        constant(heads // k.shape[1]),
        constant(tiles.chunk),
        constant(next_power_of_2(head_dim)),
        constant(tiles.block_v),
        constant(slices),
        segments,  # not a constant, since it varies with T, nor is the next
        segment_chunks,
    )
    return Plan(problem, tiles, sequences, heads, segments, slices)


def empty_like_rows(
    x: Tensor,
    width: int,
    *,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
    zero: bool = False,
) -> Tensor:
    """[B, H, T, width] in x's memory order; ``zero`` where not every token will be written."""
    heads, length = x.shape[1:3]
    batch = x.shape[0] if batch is None else batch
    if heads > 1 and length > 1 and x.stride(1) < x.stride(2):
        y = x.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    else:
        y = x.new_empty(batch, heads, length, width, dtype=dtype)
    return y.zero_() if zero else y
