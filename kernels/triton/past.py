"""Sequences whose older keys lie in a pool of states: where they are, and how it is brought up to
date (SPEC 5).

A key at a position before ``past.length`` is in the ring or among the sinks, the others are the
call's own tokens. The pool changes under the programs of a launch, so each part of it is written
by the one program that reads it, or by the last to arrive of those that do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .problem import Past, Place, Remembered
from .tokens import load_tile, rows_of, store_tile, tokens_at
from .window import window_start


@triton.jit
def past_of(p, pool, new):
    """The past of the program's sequence, to which new.length tokens are added."""
    slot = new.n
    if pool.slots is not None:
        slot = tl.load(pool.slots + new.n)
    slot = slot.to(tl.int64)
    known = (slot >= 0) & (slot.to(tl.float32) < pool.size)
    length = tl.load(pool.length + slot, mask=known, other=0).to(tl.int32)
    folded = tl.load(pool.folded + slot, mask=known, other=0).to(tl.int32)
    total = length + new.length
    # Even after ``slack`` tokens are taken back, no query needs the keys before this one.
    folded_after = tl.maximum(folded, window_start(p.window, total - 1 - pool.slack))
    start, end = tl.maximum(folded, p.window.sink), tl.maximum(folded_after, p.window.sink)
    return Past(slot, known, length, total, start, end, folded_after)


@triton.jit
def with_head(at, head, length):
    """The place with another head and length."""
    return Place(
        at.n, at.batch, at.first, length, head, at.part, at.column, at.segment, at.index
    )  # fmt: skip


@triton.jit
def folded_before(p, past, c):
    """The state that the queries of chunk c read holds the keys before this position.

    They have left the windows of all its queries, and will be in the state after the call.
    """
    first = past.length + c * p.chunk
    return tl.maximum(past.start, tl.minimum(window_start(p.window, first), past.end))


@triton.jit
def cells_of(store, past, head, index):
    """Pointers to rows ``index`` of a ring or of sinks."""
    base = store.pointer + past.slot * store.batch + head.to(tl.int64) * store.head
    return base + index * store.token


@triton.jit
def rows_where(p, new, past, x, tokens, store, index, old):
    """Pointers to rows ``index`` of a store where ``old``, else to the new tokens of x."""
    head = new.head // p.group
    rows = rows_of(x, new.batch, head, tokens)
    if store is None:
        return rows
    else:
        return tl.where(old, cells_of(store, past, head, index), rows)


@triton.jit
def keys_at(p, pool, new, past, position, BLOCK: tl.constexpr):
    """The keys at positions [position, position + BLOCK), which the state does not hold yet."""
    tokens = tokens_at(p, new, position - past.length, BLOCK)
    positions = position + tl.arange(0, BLOCK)
    old, index = positions < past.length, positions
    if pool.ring > 0:
        index = positions % pool.ring
    k = rows_where(p, new, past, p.k, tokens, pool.k_ring, index, old)
    v = rows_where(p, new, past, p.v, tokens, pool.v_ring, index, old)
    return Remembered(k, v, positions, positions < past.total)


@triton.jit
def sinks_at(p, pool, new, past):
    """The sinks."""
    positions = tl.arange(0, p.window.sink_block)
    tokens = tokens_at(p, new, -past.length, p.window.sink_block)
    old = positions < past.length
    k = rows_where(p, new, past, p.k, tokens, pool.k_sink, positions, old)
    v = rows_where(p, new, past, p.v, tokens, pool.v_sink, positions, old)
    return Remembered(k, v, positions, (positions < p.window.sink) & (positions < past.total))


@triton.jit
def load_keys(p, keys):
    """[BLOCK, block_d]"""
    return load_tile(keys.k, keys.valid, 0, p.k.width, p.block_d)


@triton.jit
def load_values(p, at, keys):
    """[BLOCK, block_v]"""
    return load_tile(keys.v, keys.valid, at.column, p.v.width, p.block_v)


@triton.jit
def copy_tokens(p, new, past, x, store, modulus, begin, end, WIDTH: tl.constexpr):
    """Rows of x at positions [begin, end) into the cells position % modulus of a store."""
    BLOCK: tl.constexpr = 16
    head = new.head // p.group
    for position in range(begin, end, BLOCK):
        tokens = tokens_at(p, new, position - past.length, BLOCK)
        positions = position + tl.arange(0, BLOCK)
        inside = tokens.valid & (positions < end)
        tile = load_tile(rows_of(x, new.batch, head, tokens), inside, 0, x.width, WIDTH)
        cells = cells_of(store, past, head, positions % modulus)
        store_tile(cells, tile, inside, 0, x.width, WIDTH)


@triton.jit
def remember(p, pool, new, past, VALUE_WIDTH: tl.constexpr):
    """The new tokens of a key/value head into ring and sinks."""
    if pool.ring > 0:
        begin = tl.maximum(past.length, past.total - pool.ring)
        copy_tokens(p, new, past, p.k, pool.k_ring, pool.ring, begin, past.total, p.block_d)
        copy_tokens(p, new, past, p.v, pool.v_ring, pool.ring, begin, past.total, VALUE_WIDTH)
    if p.window.sink > 0:
        end = tl.minimum(past.total, p.window.sink)
        copy_tokens(p, new, past, p.k, pool.k_sink, end, past.length, end, p.block_d)
        copy_tokens(p, new, past, p.v, pool.v_sink, end, past.length, end, VALUE_WIDTH)


@triton.jit
def is_last(counter, count):
    """Whether the count - 1 other programs that share ``counter`` have arrived before this one.

    Then they have read what they need, which may be overwritten.
    """
    tl.debug_barrier()  # one thread counts for the program: the others must have read too
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
