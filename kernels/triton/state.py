"""The recurrent state of a program, [F, BLOCK_V] in registers (SPEC 5)."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import operand, outer_product, product, project
from .problem import Sides, State, Sums
from .tokens import load_k, load_v, rows_of, tokens_at
from .window import folds, weighs_last

# What is added to ksum [f] is a product with a tile of this width, the least of a product, whose
# columns are then summed. As sums over the tokens of a tile it would go through shared memory.
# Where queries come one by one, products are sums anyway, and one column is enough.
SUM_BLOCK = tl.constexpr(16)


@triton.jit
def column_index(p):
    """The columns of a tile that holds ksum, [1, SUM_BLOCK] or [1, 1]."""
    if p.chunk == 1:
        return tl.arange(0, 1)[None, :]
    else:
        return tl.arange(0, SUM_BLOCK)[None, :]


@triton.jit
def columns(p, x, HIGH: tl.constexpr, LOW: tl.constexpr):
    """x [n] as an operand [n, SUM_BLOCK]: x, rounded, in the columns of the bit mask HIGH, what the
    rounding lost in those of LOW, 0 in the others.

    High and low together hold twice the digits of bf16. They have to: gradients are differences of
    large products with kv and with ksum.
    """
    bit = 1 << column_index(p)
    high = x.to(p.arithmetic.dtype).to(tl.float32)
    y = tl.where((bit & HIGH) != 0, high[:, None], 0.0)
    return tl.where((bit & LOW) != 0, (x - high)[:, None], y).to(p.arithmetic.dtype)


@triton.jit
def empty_state(p):
    kv = tl.zeros((p.map_k.block, p.block_v), tl.float32)
    ksum = tl.zeros((p.map_k.block,), tl.float32)
    if p.map_k.two_sided:
        return State(Sides(kv, kv), Sides(ksum, ksum))
    else:
        return State(Sides(kv, None), Sides(ksum, None))


@triton.jit
def side_pointers(p, at, slot, side: tl.constexpr, BY_SLICE: tl.constexpr):
    """(offsets into kv [slots, F, V], mask, into ksum [slots, F], mask) of a side; BY_SLICE: ksum
    is [slots, slices, F]."""
    sides = 2 if p.map_k.two_sided else 1
    row, column = tl.arange(0, p.map_k.block), at.column + tl.arange(0, p.block_v)
    rows = slot.to(tl.int64) * (sides * p.map_k.width) + side * p.map_k.width + row
    inside = (row < p.map_k.width)[:, None] & (column < p.v.width)[None, :]
    sums = rows
    if BY_SLICE:
        sums = (slot.to(tl.int64) * p.slices + at.part) * (sides * p.map_k.width)
        sums += side * p.map_k.width + row
    return rows[:, None] * p.v.width + column[None, :], inside, sums, row < p.map_k.width


@triton.jit
def load_state(p, at, kv, ksum, slot, BY_SLICE: tl.constexpr):
    """The program's columns of the state in ``slot``; an empty one where kv is None."""
    if kv is None:
        return empty_state(p)
    else:
        at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 0, BY_SLICE)
        kv_plus = tl.load(kv + at_kv, mask=in_kv, other=0.0)
        ksum_plus = tl.load(ksum + at_ksum, mask=in_ksum, other=0.0)
        if p.map_k.two_sided:
            at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 1, BY_SLICE)
            kv_minus = tl.load(kv + at_kv, mask=in_kv, other=0.0)
            ksum_minus = tl.load(ksum + at_ksum, mask=in_ksum, other=0.0)
            return State(Sides(kv_plus, kv_minus), Sides(ksum_plus, ksum_minus))
        else:
            return State(Sides(kv_plus, None), Sides(ksum_plus, None))


@triton.jit
def store_kv(p, at, kv, slot, state):
    """The program's columns of kv."""
    at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 0, False)
    tl.store(kv + at_kv, state.kv.plus, mask=in_kv)
    if p.map_k.two_sided:
        at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 1, False)
        tl.store(kv + at_kv, state.kv.minus, mask=in_kv)


@triton.jit
def store_ksum(p, at, ksum, slot, state, BY_SLICE: tl.constexpr):
    at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 0, BY_SLICE)
    tl.store(ksum + at_ksum, state.ksum.plus, mask=in_ksum)
    if p.map_k.two_sided:
        at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 1, BY_SLICE)
        tl.store(ksum + at_ksum, state.ksum.minus, mask=in_ksum)


@triton.jit
def store_state(p, at, kv, ksum, slot, state, BY_SLICE: tl.constexpr):
    """The inverse of load_state. Not BY_SLICE, the program of the first columns writes ksum."""
    store_kv(p, at, kv, slot, state)
    if BY_SLICE or at.part == 0:
        store_ksum(p, at, ksum, slot, state, BY_SLICE)


@triton.jit
def key_features(p, at, tokens, k, weight_k):
    """phi_k of a tile of keys as an operand of products, [C, f] for each side."""
    rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
    return features_at(p, at, k, rows, tokens.valid, weight_k)


@triton.jit
def features_at(p, at, k, rows, valid, weight_k):
    """The same, of keys at ``rows``."""
    z = project(k, rows, valid, weight_k, p.map_k, at.head, p.arithmetic)
    return operand(z, p.map_k, None, p.arithmetic)


@triton.jit
def add_total(p, phi, total, ksum):
    """ksum + phi^T total, total [C]."""
    if p.chunk == 1:
        return ksum + tl.sum(phi * total[:, None], 0)
    else:
        sums = product(tl.trans(phi), columns(p, total, 0b01, 0b10), None, p.arithmetic)
        return ksum + tl.sum(sums, 1)


@triton.jit
def add_rows(p, state, phi, x, total):
    """The state with phi^T x and phi^T total, x [C, BLOCK_V] and total [C]."""
    kv = outer_product(phi.plus, x, state.kv.plus, p.arithmetic)
    ksum = add_total(p, phi.plus, total, state.ksum.plus)
    if phi.minus is None:
        return State(Sides(kv, None), Sides(ksum, None))
    else:
        kv_minus = outer_product(phi.minus, x, state.kv.minus, p.arithmetic)
        ksum_minus = add_total(p, phi.minus, total, state.ksum.minus)
        return State(Sides(kv, kv_minus), Sides(ksum, ksum_minus))


@triton.jit
def absorb(p, state, tokens, phi, v):
    """The state with a tile of keys, those that enter it."""
    keep = folds(p, tokens)
    if p.window.sink > 0:  # the others are zero already
        v = tl.where(keep[:, None], v, 0.0)
    return add_rows(p, state, phi, v, tl.where(keep, 1.0, 0.0))


@triton.jit
def absorb_carried(p, at, state, c, back, tokens, tile, phi, weight_k):
    """The state with a tile of keys, ``back`` tiles before chunk c, if later chunks do not weigh it
    pair by pair. phi: its features, or None."""
    for _ in tl.range(weighs_last(p, c, back), disable_licm=True):
        if phi is None:
            state = absorb(p, state, tokens, key_features(p, at, tokens, tile.k, weight_k), tile.v)
        else:
            state = absorb(p, state, tokens, phi, tile.v)
    return state


@triton.jit
def absorb_tiles(p, at, state, begin, end, weight_k):
    """The state with the tiles [begin, end)."""
    for t in range(begin, end):
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        phi = key_features(p, at, tokens, load_k(p, at, tokens), weight_k)
        state = absorb(p, state, tokens, phi, load_v(p, at, tokens))
    return state


@triton.jit
def query_features(p, at, tokens, q, weight_q, factor):
    """factor * phi_q of a chunk as an operand of products, [C, f] for each side."""
    rows = rows_of(p.q, at.batch, at.head, tokens)
    z = project(q, rows, tokens.valid, weight_q, p.map_q, at.head, p.arithmetic)
    return operand(z, p.map_q, factor, p.arithmetic)


@triton.jit
def read_state(p, state, phi, sums):
    """sums with what queries of features phi read from the state."""
    acc = product(phi.plus, state.kv.plus, sums.acc, p.arithmetic)
    ksum = columns(p, state.ksum.plus, 0b01, 0b10)
    total = product(phi.plus, ksum, None, p.arithmetic)
    if phi.minus is not None:
        acc = product(phi.minus, state.kv.minus, acc, p.arithmetic)
        ksum = columns(p, state.ksum.minus, 0b01, 0b10)
        total = product(phi.minus, ksum, total, p.arithmetic)
    return Sums(sums.m, sums.den + tl.sum(total, 1), acc)
