"""Attention backward, in two passes: features and states are recomputed in each.

With g_i = do_i / den_i and delta_i = g_i . y_i, the gradient of an unnormalised weight a_ij is

    da_ij = g_i . v_j - delta_i.

``backward_of_queries`` goes forward in time with the state of the forward pass:

    dphi_q_i = lambda (kv g_i - delta_i ksum + sum_N da_ij phi_k_j)
    dm_i     = phi_q_i . dphi_q_i
    ds_ij    = a_ij da_ij + dm_i [s_ij = m_i] / (how many of the row are)  for j in W(i)
    dq_i     = scale sum_W ds_ij k_j + the gradient of phi_q

The maximum's gradient dm_i is -sum_W a_ij da_ij; since sum_j a_ij da_ij = 0 over all j, it is also
what is written above, which is exactly zero where N(i) is empty.

So the ds_ij of a query add up to zero, and dq_i is the same for keys less by any vector. Rounded
they add up to something, which dq would have times what all keys have in common: dq_i loses their
sum times a mean of the chunk's keys.

delta_i comes from a y_i that has been rounded, and where values or features have a mean, gradients
are small differences beside that. But sum_W a_ij da_ij + dm_i, which would be zero (eps delta_i
where den has an eps), is what delta_i is off by, times den_i. So the first pass sums over the
softmax pairs while it looks for their maximum, and goes on with the right delta: for ds, for the
gate, whose gradient is a multiple of the sum of dm_i, and for the second pass. dphi_q_i loses
lambda times the excess of ksum and of the features of its own chunk; pairs of N(i) in older chunks,
a tile or two of all keys, keep theirs. For the same reason kv is rounded as that of values less by
their mean, found anew whenever the state has doubled: without one a common value would drown the
differences, and what the mean of a first few is off by would grow with the number of keys, where
kv without its mean grows with the root of that.

``backward_of_keys`` goes backward in time with the state's gradient, the sums of phi_q g^T and of
-phi_q delta over the queries whose state holds the keys:

    dphi_k_j = dkv v_j + dksum + lambda sum_N da_ij phi_q_i
    dv_j     = phi_k_j . dkv + sum_pairs a_ij g_i
    dk_j     = scale sum_W ds_ij q_i + the gradient of phi_k

Here, too, what values have in common, a mean c, is kept from being rounded: what dkv and g lack as
operands, times c, goes into dksum.

All of it is linear in do, so programs that take BLOCK_V columns of V each add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .features import product
from .forward import scores
from .problem import Rows, Sides, State
from .state import columns
from .tokens import load_tile, load_wide, rows_of, statistic


class Incoming(NamedTuple):
    """The gradient that comes in, of y or, times ``coefficient``, of attention_transfer's."""

    do: Rows
    out: Rows  # y, or None: then ``delta`` is do . y
    delta: Any  # [B, H, T] or None
    den: Any  # [B, H, T]; None without normalisation
    coefficient: Any  # pointer to a factor of do and delta, or None
    constant: Any  # [B, H, T] to be added to -da of all of a query's pairs, or None
    eps: Any  # of den


class RowGradients(NamedTuple):
    """What the first pass leaves to the second: [slices, B, H, T]."""

    delta: Any
    m: Any  # in units of log2 e, [B, H, T]
    tie: Any  # dm, shared among the largest scores
    slice: Any  # B H T


class Parts(NamedTuple):
    """Partial gradients [parts, B, H, T, width], to be summed over the parts."""

    rows: Rows
    stride: Any


class RowGradient(NamedTuple):
    """What came in for a chunk of queries: da = factor do . v - delta.

    do is kept as it came, since bf16 would round do / den, and what is left of da after delta has
    been taken away can be as small as that rounding.
    """

    do: Any  # [C, BLOCK_V], an operand
    factor: Any  # [C], 1 / den
    delta: Any  # [C], y . do / den


class Queries(NamedTuple):
    """A chunk of queries and what came in for them."""

    q: Any  # [C, BLOCK_D]
    row: RowGradient
    m: Any  # [C]
    tie: Any  # [C]


@triton.jit
def load_do(p, at, incoming, tokens):
    """do as an operand, [C, BLOCK_V]."""
    rows = rows_of(incoming.do, at.batch, at.head, tokens)
    if rows.dtype.element_ty == tl.float32 and p.arithmetic.dtype != tl.float32:
        do = load_wide(rows, tokens.valid, at.column, p.v.width, p.block_v)
    else:
        do = load_tile(rows, tokens.valid, at.column, p.v.width, p.block_v)
    return do.to(p.arithmetic.dtype)


@triton.jit
def row_factor(p, at, incoming, tokens):
    """coefficient / den of a chunk of queries, [C]."""
    factor = tl.full((p.chunk,), 1.0, tl.float32)
    if incoming.den is not None:
        own = statistic(p, at, tokens)
        factor = 1.0 / tl.load(incoming.den + own, mask=tokens.valid, other=1.0)
    if incoming.coefficient is not None:
        factor *= tl.load(incoming.coefficient)
    return factor


@triton.jit
def incoming_of(p, at, incoming, tokens):
    """The RowGradient of a chunk. What does not depend on V counts for the first slice."""
    do, factor = load_do(p, at, incoming, tokens), row_factor(p, at, incoming, tokens)
    own = statistic(p, at, tokens)
    delta = tl.zeros((p.chunk,), tl.float32)
    if incoming.out is not None:
        out_rows = rows_of(incoming.out, at.batch, at.head, tokens)
        y = load_tile(out_rows, tokens.valid, at.column, p.v.width, p.block_v)
        delta = tl.sum(do.to(tl.float32) * y.to(tl.float32), 1) * factor
    elif incoming.delta is not None:
        if at.part == 0:
            delta = tl.load(incoming.delta + own, mask=tokens.valid, other=0.0) * factor
    if incoming.constant is not None:
        if at.part == 0:
            den = tl.load(incoming.den + own, mask=tokens.valid, other=1.0)
            delta += tl.load(incoming.constant + own, mask=tokens.valid, other=0.0) / den
    return RowGradient(do, factor, delta)


@triton.jit
def weight_gradients(p, row, v):
    """da, [queries, keys]."""
    da = product(row.do, tl.trans(v), None, p.arithmetic)
    return da * row.factor[:, None] - row.delta[:, None]


@triton.jit
def add_product(a, b, sides, arithmetic):
    """sides + a @ b, for a [n, m] and both sides of b, [m, f]."""
    plus = product(a, b.plus, sides.plus, arithmetic)
    if b.minus is None:
        return Sides(plus, None)
    else:
        return Sides(plus, product(a, b.minus, sides.minus, arithmetic))


@triton.jit
def center_of(state):
    """The vector [BLOCK_V] whose product with ksum is nearest to kv, of one side: a mean of the
    values."""
    ksum = state.ksum.plus
    largest = tl.max(tl.abs(ksum), 0)
    factor = 1.0 / tl.where(largest > 0.0, largest, 1.0)  # lest squares overflow
    weights = ksum * factor
    total = tl.sum(weights[:, None] * state.kv.plus, 0)
    return total * factor / tl.maximum(tl.sum(weights * weights, 0), 1.0)


@triton.jit
def centered(state, center):
    """The state of values that are less by ``center`` [BLOCK_V]."""
    plus = state.kv.plus - state.ksum.plus[:, None] * center[None, :]
    if state.kv.minus is None:
        return State(Sides(plus, None), state.ksum)
    else:
        minus = state.kv.minus - state.ksum.minus[:, None] * center[None, :]
        return State(Sides(plus, minus), state.ksum)


@triton.jit
def state_product(p, x, factor, delta, state):
    """factor * (x . kv^T) - delta * ksum, [C, f] for both sides; x [C, BLOCK_V]."""
    column = columns(p, -delta, 0b101, 0b010)  # high, low, high
    ksum = columns(p, state.ksum.plus, 0b011, 0b100)  # high, high, low
    plus = product(x, tl.trans(state.kv.plus), None, p.arithmetic) * factor[:, None]
    plus = product(column, tl.trans(ksum), plus, p.arithmetic)
    if state.kv.minus is None:
        return Sides(plus, None)
    else:
        ksum = columns(p, state.ksum.minus, 0b011, 0b100)
        minus = product(x, tl.trans(state.kv.minus), None, p.arithmetic) * factor[:, None]
        return Sides(plus, product(column, tl.trans(ksum), minus, p.arithmetic))


@triton.jit
def softmax_weights(s, inside, m, log2_g):
    """g exp(s - m) of the pairs in W, [queries, keys]."""
    return tl.where(inside, tl.exp2(s - (m - log2_g)[:, None]), 0.0)


@triton.jit
def score_gradients(s, inside, weights, da, m, tie):
    """ds of the pairs in W, [queries, keys]."""
    ds = weights * da
    return ds + tl.where(inside & (s == m[:, None]), tie[:, None], 0.0)


@triton.jit
def softmax_pairs(p, queries, k, v, inside, log2_g):
    """(a / den, ds / scale) of the pairs of a tile that are attended by softmax."""
    s = scores(p, queries.q, k)
    weights = softmax_weights(s, inside, queries.m, log2_g)
    da = weight_gradients(p, queries.row, v)
    ds = score_gradients(s, inside, weights, da, queries.m, queries.tie)
    return weights * queries.row.factor[:, None], ds
