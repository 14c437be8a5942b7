"""Tiles that chunks leave to the next ones: what a loop carries, in registers, nearest first."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tokens import load_k, load_v, tokens_at


class Keys(NamedTuple):
    """A tile of keys and values."""

    k: Any  # [C, BLOCK_D]
    v: Any  # [C, BLOCK_V]


@triton.jit
def packed(x):
    """A tile to be carried to the next turn of a loop. In that, numbers of 16 bits would take a
    register each."""
    if x.dtype.primitive_bitwidth == 16:
        pairs = x.to(tl.uint16, bitcast=True).to(tl.uint32).reshape(x.shape[0], x.shape[1] // 2, 2)
        low, high = tl.split(pairs)
        return low | (high << 16)
    else:
        return x


@triton.jit
def unpacked(x, dtype):
    """The tile that was packed. Not by tl.join: products of what that returns are laid out for
    numbers of half the size, which ldmatrix does not load."""
    if x.dtype == tl.uint32:
        bits = 16 * tl.arange(0, 2).to(tl.uint32)
        pairs = x.reshape(x.shape[0], x.shape[1], 1) >> bits[None, None, :]
        return pairs.to(tl.uint16).reshape(x.shape[0], 2 * x.shape[1]).to(dtype, bitcast=True)
    else:
        return x


@triton.jit
def carried_on(p, tile, carried):
    """What the next turn gets: ``tile``, and of those carried all but the farthest."""
    if p.window.carried == 0:
        return carried
    else:
        tiles = (tile,)
        for back in tl.static_range(p.window.carried - 1):
            tiles = tiles + (carried[back],)
        return tiles


@triton.jit
def packed_keys(k, v):
    return Keys(packed(k), packed(v))


@triton.jit
def packed_keys_before(p, at, c):
    """The tiles before chunk c."""
    tiles = ()
    for back in tl.static_range(1, p.window.carried + 1):
        old = tokens_at(p, at, (c - back) * p.chunk, p.chunk)
        tiles = tiles + (packed_keys(load_k(p, at, old), load_v(p, at, old)),)
    return tiles


@triton.jit
def unpacked_tile(keys, dtype: tl.constexpr):
    return Keys(unpacked(keys.k, dtype), unpacked(keys.v, dtype))


@triton.jit
def unpacked_anew(keys, dtype: tl.constexpr, c):
    """The same, with keys of which the compiler does not know that they are the same: a tile of
    both would lie in shared memory from the first use to the last. c is a chunk, at least 0."""
    k = keys.k
    if k.dtype == tl.uint32:
        k += tl.minimum(c, 0).to(tl.uint32)
    return unpacked_tile(Keys(k, keys.v), dtype)


@triton.jit
def unpacked_tiles(p, carried, dtype: tl.constexpr):
    tiles = ()
    for back in tl.static_range(p.window.carried):
        tiles = tiles + (unpacked_tile(carried[back], dtype),)
    return tiles
