"""The recurrent state of a program, [F, BLOCK_V] in registers (SPEC 5)."""

from __future__ import annotations

import triton
import triton.language as tl

from .features import product
from .problem import Sides, State


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
    f = p.map_k
    sides = 2 if f.two_sided else 1
    row, column = tl.arange(0, f.block), at.column + tl.arange(0, p.block_v)
    rows = slot.to(tl.int64) * (sides * f.width) + side * f.width + row
    inside = (row < f.width)[:, None] & (column < p.v.width)[None, :]
    return rows[:, None] * p.v.width + column[None, :], inside, rows, row < f.width


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
def store_state(p, at, kv, ksum, slot, state):
    """The inverse. The program of the first columns writes ksum."""
    at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 0)
    tl.store(kv + at_kv, state.kv.plus, mask=in_kv)
    if at.part == 0:
        tl.store(ksum + at_ksum, state.ksum.plus, mask=in_ksum)
    if p.map_k.two_sided:
        at_kv, in_kv, at_ksum, in_ksum = side_pointers(p, at, slot, 1)
        tl.store(kv + at_kv, state.kv.minus, mask=in_kv)
        if at.part == 0:
            tl.store(ksum + at_ksum, state.ksum.minus, mask=in_ksum)


@triton.jit
def absorb(state, phi, v, arithmetic):
    """The state with phi(k_j) v_j^T and phi(k_j) of a tile of keys."""
    kv = product(tl.trans(phi.plus), v, state.kv.plus, arithmetic)
    ksum = state.ksum.plus + tl.sum(phi.plus, 0)
    if phi.minus is None:
        return State(Sides(kv, None), Sides(ksum, None))
    else:
        kv_minus = product(tl.trans(phi.minus), v, state.kv.minus, arithmetic)
        ksum_minus = state.ksum.minus + tl.sum(phi.minus, 0)
        return State(Sides(kv, kv_minus), Sides(ksum, ksum_minus))


@triton.jit
def read_state(state, phi, acc, arithmetic):
    """acc + phi . kv, [tokens, BLOCK_V]."""
    acc = product(phi.plus, state.kv.plus, acc, arithmetic)
    if phi.minus is not None:
        acc = product(phi.minus, state.kv.minus, acc, arithmetic)
    return acc


@triton.jit
def ksum_rows(state):
    """ksum as rows, to be broadcast over tokens."""
    if state.ksum.minus is None:
        return Sides(state.ksum.plus[None, :], None)
    else:
        return Sides(state.ksum.plus[None, :], state.ksum.minus[None, :])
