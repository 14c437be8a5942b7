"""The recurrent state of a program, [F, BLOCK_V] in registers (SPEC 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .features import activate_side, clamp_side, outer_product, product, project, scaled
from .problem import Sides, State
from .tokens import load_k, load_v, rows_of, tokens_at
from .window import folds


@triton.jit
def empty_state(p):
    kv = tl.zeros((p.map_k.block, p.block_v), tl.float32)
    ksum = tl.zeros((p.map_k.block,), tl.float32)
    if p.map_k.two_sided:
        return State(Sides(kv, kv), Sides(ksum, ksum))
    else:
        return State(Sides(kv, None), Sides(ksum, None))


@triton.jit
def side_pointers(p, at, slot, side: tl.constexpr):
    """(offsets into kv [..., F, V], mask, offsets into ksum [..., F], mask) of a side."""
    sides = 2 if p.map_k.two_sided else 1
    row, column = tl.arange(0, p.map_k.block), at.column + tl.arange(0, p.block_v)
    rows = slot.to(tl.int64) * (sides * p.map_k.width) + side * p.map_k.width + row
    inside = (row < p.map_k.width)[:, None] & (column < p.v.width)[None, :]
    return rows[:, None] * p.v.width + column[None, :], inside, rows, row < p.map_k.width


@triton.jit
def load_state(p, at, kv, ksum, slot):
    """The program's columns of the state in ``slot``; an empty one where kv is None."""
    if kv is None:
        return empty_state(p)
    else:
        at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 0)
        kv_plus = tl.load(kv + at_kv, mask=in_kv, other=0.0)
        ksum_plus = tl.load(ksum + at_ksum, mask=in_ksum, other=0.0)
        if p.map_k.two_sided:
            at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 1)
            kv_minus = tl.load(kv + at_kv, mask=in_kv, other=0.0)
            ksum_minus = tl.load(ksum + at_ksum, mask=in_ksum, other=0.0)
            return State(Sides(kv_plus, kv_minus), Sides(ksum_plus, ksum_minus))
        else:
            return State(Sides(kv_plus, None), Sides(ksum_plus, None))


@triton.jit
def store_kv(p, at, kv, slot, state):
    at_kv, in_kv, _, _ = side_pointers(p, at, slot, 0)
    tl.store(kv + at_kv, state.kv.plus, mask=in_kv)
    if p.map_k.two_sided:
        at_kv, in_kv, _, _ = side_pointers(p, at, slot, 1)
        tl.store(kv + at_kv, state.kv.minus, mask=in_kv)


@triton.jit
def store_ksum(p, at, ksum, slot, state):
    _, _, at_ksum, in_ksum = side_pointers(p, at, slot, 0)
    tl.store(ksum + at_ksum, state.ksum.plus, mask=in_ksum)
    if p.map_k.two_sided:
        _, _, at_ksum, in_ksum = side_pointers(p, at, slot, 1)
        tl.store(ksum + at_ksum, state.ksum.minus, mask=in_ksum)


@triton.jit
def store_state(p, at, kv, ksum, slot, state):
    """The inverse of load_state. The program of the first columns writes ksum."""
    store_kv(p, at, kv, slot, state)
    if at.part == 0:
        store_ksum(p, at, ksum, slot, state)


class Keys(NamedTuple):
    """Features of a tile of keys: as operands of products, and summed over the tile in fp32."""

    phi: Sides  # [C, f]
    total: Sides  # [f]


@triton.jit
def key_features(p, at, tokens, k, weight_k):
    """The features of a tile of keys, zero for what does not enter the state."""
    rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
    return features_to_keep(p, at, k, rows, tokens.valid, folds(p, tokens), weight_k)


@triton.jit
def features_to_keep(p, at, k, rows, valid, keep, weight_k):
    """The features of the keys at ``rows``, zero where not ``keep``.

    A side is rounded before the next is made, so that one at a time takes fp32 registers.
    """
    z = project(k, rows, valid, weight_k, p.map_k, at.head, p.arithmetic)
    keep = keep[:, None]
    plus = tl.where(keep, clamp_side(activate_side(z, p.map_k), p.map_k), 0.0)
    total, phi = tl.sum(plus, 0), plus.to(p.arithmetic.dtype)
    if p.map_k.two_sided:
        minus = tl.where(keep, clamp_side(activate_side(-z, p.map_k), p.map_k), 0.0)
        return Keys(Sides(phi, minus.to(p.arithmetic.dtype)), Sides(total, tl.sum(minus, 0)))
    else:
        return Keys(Sides(phi, None), Sides(total, None))


@triton.jit
def absorb(state, keys, v, arithmetic):
    """The state with phi(k_j) v_j^T and phi(k_j) of a tile of keys."""
    kv = outer_product(keys.phi.plus, v, state.kv.plus, arithmetic)
    ksum = state.ksum.plus + keys.total.plus
    if keys.phi.minus is None:
        return State(Sides(kv, None), Sides(ksum, None))
    else:
        kv_minus = outer_product(keys.phi.minus, v, state.kv.minus, arithmetic)
        ksum_minus = state.ksum.minus + keys.total.minus
        return State(Sides(kv, kv_minus), Sides(ksum, ksum_minus))


@triton.jit
def absorb_tiles(p, at, state, begin, end, weight_k):
    """The state with the tiles [begin, end)."""
    for t in range(begin, end):
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        keys = key_features(p, at, tokens, load_k(p, at, tokens), weight_k)
        state = absorb(state, keys, load_v(p, at, tokens), p.arithmetic)
    return state


class Reading(NamedTuple):
    """What a chunk of queries reads from the state."""

    phi: Sides  # lambda phi_q, as operands of products, [C, f]
    den: Any  # [C]
    acc: Any  # [C, BLOCK_V]


@triton.jit
def read_state(p, at, state, tokens, q, weight_q, factor, den, acc):
    """phi_q of a chunk, and den and acc with what it reads."""
    rows = rows_of(p.q, at.batch, at.head, tokens)
    z = project(q, rows, tokens.valid, weight_q, p.map_q, at.head, p.arithmetic)
    return read_projected(p, state, z, factor, den, acc)


@triton.jit
def read_projected(p, state, z, factor, den, acc):
    """The same, from the projected queries."""
    plus = scaled(clamp_side(activate_side(z, p.map_q), p.map_q), factor)
    den += tl.sum(plus * state.ksum.plus[None, :], 1)
    phi = plus.to(p.arithmetic.dtype)
    acc = product(phi, state.kv.plus, acc, p.arithmetic)
    if p.map_q.two_sided:
        minus = scaled(clamp_side(activate_side(-z, p.map_q), p.map_q), factor)
        den += tl.sum(minus * state.ksum.minus[None, :], 1)
        phi_minus = minus.to(p.arithmetic.dtype)
        acc = product(phi_minus, state.kv.minus, acc, p.arithmetic)
        return Reading(Sides(phi, phi_minus), den, acc)
    else:
        return Reading(Sides(phi, None), den, acc)
