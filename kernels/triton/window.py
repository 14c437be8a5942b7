"""Which keys a query attends by softmax and which by features, in tiles (SPEC 2)."""

from __future__ import annotations

import triton
import triton.language as tl

from .problem import SLIDING


@triton.jit
def window_start(w, i):
    """e(i)."""
    if w.size == 0:
        return i + 1
    elif w.kind == SLIDING:
        return tl.maximum(i - (w.size - 1), 0)
    else:
        return tl.maximum((i // w.size - 1) * w.size, 0)


@triton.jit
def first_linear_query(w, j):
    """The first i with e(i) > j: from there on queries weigh key j by features, unless a sink."""
    if w.size == 0:
        return j
    elif w.kind == SLIDING:
        return j + w.size
    else:
        return (j // w.size + 2) * w.size


@triton.jit
def first_tile(p, c):
    """The oldest tile of keys that chunk c weighs pair by pair: the state holds those before."""
    if p.window.size == 0:
        return c
    else:
        return window_start(p.window, c * p.chunk) // p.chunk


@triton.jit
def end_chunk(p, t):
    """The first chunk whose state holds tile t: the smallest c with first_tile(c) > t."""
    key = (t + 1) * p.chunk  # e(c C) has to reach it
    if p.window.size == 0:
        return t + 1
    elif p.window.kind == SLIDING:
        return tl.cdiv(key + p.window.size - 1, p.chunk)
    else:
        return tl.cdiv((tl.cdiv(key, p.window.size) + 1) * p.window.size, p.chunk)


@triton.jit
def reach(p, c):
    """How many tiles before its own chunk c weighs pair by pair, where they are carried; a constant
    where all chunks weigh as many."""
    if p.window.kind == SLIDING or p.window.carried == 1:
        return p.window.carried
    else:  # the later chunks of a terrace reach back farther
        return c - first_tile(p, c)


@triton.jit
def weighs(p, c, back):
    """1 if chunk c weighs the tile ``back`` tiles before it pair by pair, else 0: how many turns a
    loop has. One that is a constant leaves no loop."""
    if back * p.chunk <= p.window.size:
        return 1
    else:
        return (reach(p, c) >= back) * 1


@triton.jit
def weighs_oldest(p, c, back):
    """1 if that tile is the oldest of those that chunk c weighs pair by pair, else 0."""
    if back * p.chunk < p.window.size and back < p.window.carried:
        return 0
    else:
        return (reach(p, c) == back) * 1


@triton.jit
def weighs_last(p, c, back):
    """1 if chunk c is the last that weighs that tile pair by pair, else 0."""
    if back * p.chunk < p.window.size and back < p.window.carried:
        return 0
    else:
        return ((reach(p, c) >= back) & (reach(p, c + 1) <= back)) * 1


@triton.jit
def causal_pairs(p):
    """Which keys of its own tile a chunk of queries may attend, [C, C].

    For before the loop over chunks: there ptxas packs these predicates, 32 of a thread, into a word
    once. In the loop it makes them long before they are used, and packs them in every chunk. But
    where a chunk sees no older tile, as in linear attention, to keep the mask spills more than to
    make it anew: there it is None.
    """
    r = tl.arange(0, p.chunk)
    if not has_older(p):
        return None
    else:
        return r[:, None] >= r[None, :]


@triton.jit
def parted(known, near):
    """The pairs that are near, and the others."""
    return known & near, known & (near == 0)


@triton.jit
def own_masks(p, causal, start):
    """Of a chunk of queries at ``start`` and the keys of the same tokens: which pairs are in W,
    which in N, [C, C]; no sinks. Keys past the end are after all queries.
    """
    r = tl.arange(0, p.chunk)
    known = causal
    if causal is None:
        known = r[:, None] >= r[None, :]
    if p.window.sink > 0:
        known = known & (r + start >= p.window.sink)[None, :]
    if p.window.size == 0:
        return parted(known, known == 0)
    elif not p.window.near_linear:
        return parted(known, known)
    elif p.window.kind == SLIDING:
        return parted(known, r[:, None] - r[None, :] < p.window.size)
    else:
        first = window_start(p.window, r + start)
        return parted(known, (r + start)[None, :] >= first[:, None])


@triton.jit
def has_older(p):
    """Whether chunks weigh tiles before their own pair by pair."""
    return p.window.carried > 0 or p.window.read_again


@triton.jit
def has_linear(p, back):
    """Whether the tile ``back`` tiles before a chunk can hold keys that are weighed by features."""
    if p.window.kind == SLIDING:
        return (back + 1) * p.chunk > p.window.size
    else:
        return p.window.far_linear


@triton.jit
def older_masks(p, start, distance, LINEAR: tl.constexpr):
    """The same of the tile of keys ``distance`` tokens before the chunk, one chunk or several;
    LINEAR if there can be pairs in N. Keys before the first token are in neither."""
    r = tl.arange(0, p.chunk)
    key = r + start - distance
    known = tl.broadcast_to((key >= p.window.sink)[None, :], (p.chunk, p.chunk))
    if not LINEAR:
        return parted(known, known)
    elif p.window.kind == SLIDING:
        return parted(known, r[:, None] + distance - r[None, :] < p.window.size)
    else:
        first = window_start(p.window, r + start)
        return parted(known, key[None, :] >= first[:, None])


@triton.jit
def position_masks(p, at, i, j):
    """The same of queries at positions i and keys at j, whatever their tiles."""
    known = (j >= p.window.sink) & (j < at.length)
    causal = (j[None, :] <= i[:, None]) & known[None, :]
    if p.window.size == 0:
        return parted(causal, causal == 0)
    else:
        return parted(causal, j[None, :] >= window_start(p.window, i)[:, None])


@triton.jit
def linear_mask(p, start, j):
    """Which pairs are in N, of queries with window starts ``start`` and keys at j."""
    if p.window.sink > 0:
        return (j[None, :] < start[:, None]) & (j >= p.window.sink)[None, :]
    else:
        return j[None, :] < start[:, None]


@triton.jit
def sink_mask(p, at, i, j):
    """Which pairs of queries at i and keys at j are attended because j is a sink."""
    sinks = (j < p.window.sink) & (j < at.length)
    return (j[None, :] <= i[:, None]) & sinks[None, :]


@triton.jit
def folds(p, tokens):
    """Which of a tile of keys enter the state: sinks do not."""
    return tokens.valid & (tokens.position >= p.window.sink)
