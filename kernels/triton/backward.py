"""Attention backward: features and states are recomputed, in two passes over the tokens.

With g_i = do_i / den_i and delta_i = g_i . y_i, the gradient of an unnormalised weight a_ij is

    da_ij = g_i . v_j - delta_i.

``backward_queries`` goes forward in time with the state of the forward pass:

    dphi_q_i = lambda (kv g_i - delta_i ksum + sum_N da_ij phi_k_j)
    dm_i     = phi_q_i . dphi_q_i
    ds_ij    = a_ij da_ij + dm_i [s_ij = m_i] / (how many of the row are)  for j in W(i)
    dq_i     = scale sum_W ds_ij k_j + the gradient of phi_q

The maximum's gradient dm_i is -sum_W a_ij da_ij; since sum_j a_ij da_ij = 0 over all j, it is also
what is written above, which is exactly zero where N(i) is empty. The gate's is a multiple of it.

``backward_keys`` goes backward in time with the state's gradient, the sums of phi_q g^T and of
-phi_q delta over the queries whose state holds the keys:

    dphi_k_j = dkv v_j + dksum + lambda sum_N da_ij phi_q_i
    dv_j     = phi_k_j . dkv + sum_pairs a_ij g_i
    dk_j     = scale sum_W ds_ij q_i + the gradient of phi_k

All of it is linear in do, so programs that take BLOCK_V columns of V each add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .features import (
    activate,
    activate_side,
    clamp,
    clamp_side,
    dot_rows,
    keep_rows,
    load_weight,
    product,
    project,
    scaled,
    times,
)
from .forward import linear_factor, linear_weights, log2_gate, scores
from .map_gradient import MapTile, map_gradient, store_map_gradients
from .problem import INF, Rows, Sides
from .state import (
    absorb,
    absorb_tiles,
    add_rows,
    columns,
    empty_state,
    key_features,
    load_state,
    store_state,
)
from .tokens import (
    chunk_range,
    load_k,
    load_q,
    load_tile,
    load_v,
    place_of,
    rows_of,
    statistic,
    store_tile,
    tokens_at,
)
from .window import end_chunk, first_tile, folds, pair_masks, sink_mask, window_start


class Incoming(NamedTuple):
    """The gradient that comes in, of y or, times ``coefficient``, of attention_transfer's."""

    do: Rows
    out: Rows  # y, or None: then ``delta`` is do . y
    delta: Any  # [B, H, T] or None
    den: Any  # [B, H, T]; None without normalisation
    coefficient: Any  # pointer to a factor of do and delta, or None
    constant: Any  # [B, H, T] to be added to -da of all of a query's pairs, or None


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
def map_tile(p, x, rows, valid, weight, f, head):
    z = project(x, rows, valid, weight, f, head, p.arithmetic)
    return MapTile(x, rows, valid, z, weight)


@triton.jit
def load_do(p, at, incoming, tokens):
    """do as an operand, [C, BLOCK_V]."""
    rows = rows_of(incoming.do, at.batch, at.head, tokens)
    return load_tile(rows, tokens.valid, at.column, p.v.width, p.block_v).to(p.arithmetic.dtype)


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
def state_product(p, x, factor, delta, state):
    """factor * (x . kv^T) - delta * ksum, [C, f] for both sides; x [C, BLOCK_V]."""
    column = columns(p, -delta, 0b101, 0b010)  # high, low, high
    ksum = columns(p, tl.sum(state.ksum.plus, 1), 0b011, 0b100)  # high, high, low
    plus = product(x, tl.trans(state.kv.plus), None, p.arithmetic) * factor[:, None]
    plus = product(column, tl.trans(ksum), plus, p.arithmetic)
    if state.kv.minus is None:
        return Sides(plus, None)
    else:
        ksum = columns(p, tl.sum(state.ksum.minus, 1), 0b011, 0b100)
        minus = product(x, tl.trans(state.kv.minus), None, p.arithmetic) * factor[:, None]
        return Sides(plus, product(column, tl.trans(ksum), minus, p.arithmetic))


@triton.jit
def largest_score(m, count, s, inside):
    """(m, count) with a tile of scores: the maximum, and how often it occurs."""
    s = tl.where(inside, s, -INF)
    top = tl.maximum(m, tl.max(s, 1))
    hits = tl.sum(tl.where(inside & (s == top[:, None]), 1.0, 0.0), 1)
    return top, tl.where(m == top, count, 0.0) + hits


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
def linear_pairs(p, row, v, phi_k, outside, d_phi):
    """d_phi with the pairs of a tile that are weighed by features."""
    da = tl.where(outside, weight_gradients(p, row, v), 0.0)
    return add_product(da, phi_k, d_phi, p.arithmetic)


@triton.jit
def softmax_pairs(p, queries, k, v, inside, log2_g, dq):
    """(dq, a / den, ds) with the pairs of a tile that are attended by softmax."""
    s = scores(p, queries.q, k)
    weights = softmax_weights(s, inside, queries.m, log2_g)
    da = weight_gradients(p, queries.row, v)
    ds = score_gradients(s, inside, weights, da, queries.m, queries.tie) * p.scale
    if dq is not None:
        dq = product(ds, k, dq, p.arithmetic)
    return dq, weights * queries.row.factor[:, None], ds


@triton.jit
def far_pairs(p, at, row, c, i, weight_k, d_phi):
    """d_phi with the tiles before c, read again."""
    near = window_start(p.window, c * p.chunk + p.chunk - 1)
    start = first_tile(p, c)
    for t in tl.range(start, tl.minimum(c, tl.cdiv(near, p.chunk)), disable_licm=True):
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        phi_k = key_features(p, at, tokens, load_k(p, at, tokens), weight_k)
        inside, outside = pair_masks(p, c * p.chunk, (c - t) * p.chunk)
        d_phi = linear_pairs(p, row, load_v(p, at, tokens), phi_k, outside, d_phi)
    return d_phi


@triton.jit
def row_maximum(p, at, q, k, k_old, i, c):
    """The largest score of every query's window in units of log2 e (0 if empty), and its count."""
    m = tl.full((p.chunk,), -INF, tl.float32)
    count = tl.zeros((p.chunk,), tl.float32)
    if p.window.sink > 0:
        first = tokens_at(p, at, 0, p.window.sink_block)
        s_first = scores(p, q, load_k(p, at, first))
        m, count = largest_score(m, count, s_first, sink_mask(p, at, i, first.position))
    if p.window.size > 0:
        inside, outside = pair_masks(p, c * p.chunk, 0)
        m, count = largest_score(m, count, scores(p, q, k), inside)
        if p.window.lag == 1:
            inside, outside = pair_masks(p, c * p.chunk, p.chunk)
            m, count = largest_score(m, count, scores(p, q, k_old), inside)
        elif p.window.lag == 2:
            for t in tl.range(first_tile(p, c), c, disable_licm=True):
                tokens = tokens_at(p, at, t * p.chunk, p.chunk)
                inside, outside = pair_masks(p, c * p.chunk, (c - t) * p.chunk)
                s = scores(p, q, load_k(p, at, tokens))
                m, count = largest_score(m, count, s, inside)
    return tl.where(m == -INF, 0.0, m), tl.maximum(count, 1.0)


@triton.jit
def window_pairs(p, at, queries, i, c, k, v, k_old, v_old, log2_g, dq):
    """dq with the pairs in the windows of a chunk."""
    if p.window.size > 0:
        inside, outside = pair_masks(p, c * p.chunk, 0)
        dq, weights, ds = softmax_pairs(p, queries, k, v, inside, log2_g, dq)
        if p.window.lag == 1:
            inside, outside = pair_masks(p, c * p.chunk, p.chunk)
            dq, weights, ds = softmax_pairs(p, queries, k_old, v_old, inside, log2_g, dq)
        elif p.window.lag == 2:
            for t in tl.range(first_tile(p, c), c, disable_licm=True):
                far = tokens_at(p, at, t * p.chunk, p.chunk)
                inside, outside = pair_masks(p, c * p.chunk, (c - t) * p.chunk)
                k_far, v_far = load_k(p, at, far), load_v(p, at, far)
                dq, weights, ds = softmax_pairs(p, queries, k_far, v_far, inside, log2_g, dq)
    return dq


@triton.jit
def backward_queries(
    p, incoming, left, kv0, ksum0, dq, d_weight, d_bias, d_gate, dk_sink, dv_sink
):  # fmt: skip
    """dq, the gradients of map_q, the sums of dm, and the sinks' shares of dk and dv.

    dq: Parts with a part for each slice, or None where only parameters are asked for. d_weight,
    d_bias, d_gate, dk_sink [sink_block, D] and dv_sink [sink_block, BLOCK_V]: one of each for every
    program, or None; d_weight must be zero where map_q is not resident.
    """
    at = place_of(p)
    begin, end = chunk_range(p, at)
    program = tl.program_id(0).to(tl.int64)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    log2_g, factor = log2_gate(p, at), linear_factor(p, at)
    state = load_state(p, at, kv0, ksum0, at.slot, False)
    dw, db = None, None
    own_weight = None
    if d_weight is not None:
        own_weight = d_weight + program * (p.map_q.head_dim * p.map_q.width)
        if p.map_q.resident:
            dw = tl.zeros((p.block_d, p.map_q.block), tl.float32)
    if d_bias is not None:
        db = tl.zeros((p.map_q.block,), tl.float32)
    total_dm = tl.zeros((p.chunk,), tl.float32)
    if dk_sink is not None:
        dk_first = tl.zeros((p.window.sink_block, p.block_d), tl.float32)
        dv_first = tl.zeros((p.window.sink_block, p.block_v), tl.float32)
    k_old, v_old = None, None
    if p.window.lag == 1:
        old = tokens_at(p, at, (begin - 1) * p.chunk, p.chunk)
        k_old, v_old = load_k(p, at, old), load_v(p, at, old)

    for c in tl.range(begin, end, disable_licm=True):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        i = tokens.position
        q, k, v = load_q(p, at, tokens), load_k(p, at, tokens), load_v(p, at, tokens)
        q_rows = rows_of(p.q, at.batch, at.head, tokens)
        row = incoming_of(p, at, incoming, tokens)
        part = statistic(p, at, tokens) + at.part.to(tl.int64) * left.slice
        tl.store(left.delta + part, row.delta, mask=tokens.valid)

        d_phi = state_product(p, row.do, row.factor, row.delta, state)
        if p.window.near_linear:
            phi_k = key_features(p, at, tokens, k, weight_k)
            inside, outside = pair_masks(p, c * p.chunk, 0)
            d_phi = linear_pairs(p, row, v, phi_k, outside, d_phi)
        if p.window.lag == 1:
            old = tokens_at(p, at, (c - 1) * p.chunk, p.chunk)
            phi_old = key_features(p, at, old, k_old, weight_k)
            if p.window.far_linear:
                inside, outside = pair_masks(p, c * p.chunk, p.chunk)
                d_phi = linear_pairs(p, row, v_old, phi_old, outside, d_phi)
        elif p.window.lag == 2 and p.window.far_linear:
            d_phi = far_pairs(p, at, row, c, i, weight_k, d_phi)
        if p.window.lag == 0:
            state = absorb(p, state, tokens, phi_k, v)
        elif p.window.lag == 1:
            state = absorb(p, state, old, phi_old, v_old)
        else:
            state = absorb_tiles(p, at, state, first_tile(p, c), first_tile(p, c + 1), weight_k)

        d_phi = times(d_phi, factor)
        tile = map_tile(p, q, q_rows, tokens.valid, weight_q, p.map_q, at.head)
        phi = activate(tile.z, p.map_q)
        dm = tl.where(tokens.valid, dot_rows(clamp(phi, p.map_q), d_phi), 0.0)
        total_dm += dm
        grad = None
        if dq is not None:
            grad = tl.zeros((p.chunk, p.block_d), tl.float32)
        grad, dw, dz = map_gradient(p, tile, phi, p.map_q, at.head, d_phi, grad, dw, own_weight)
        if d_bias is not None:
            db += tl.sum(dz, 0)

        if dq is not None:
            if p.window.size > 0 or p.window.sink > 0:
                m, count = row_maximum(p, at, q, k, k_old, i, c)
                queries = Queries(q, row, m, dm / count)
                tl.store(left.tie + part, queries.tie, mask=tokens.valid)
                if at.part == 0:
                    tl.store(left.m + statistic(p, at, tokens), m, mask=tokens.valid)
                if p.window.sink > 0:
                    first = tokens_at(p, at, 0, p.window.sink_block)
                    inside = sink_mask(p, at, i, first.position) & tokens.valid[:, None]
                    keys_first, v_first = load_k(p, at, first), load_v(p, at, first)
                    grad, weights, ds = softmax_pairs(
                        p, queries, keys_first, v_first, inside, log2_g, grad
                    )
                    dk_first = product(tl.trans(ds), q, dk_first, p.arithmetic)
                    dv_first = product(tl.trans(weights), row.do, dv_first, p.arithmetic)
                grad = window_pairs(p, at, queries, i, c, k, v, k_old, v_old, log2_g, grad)
            rows = rows_of(dq.rows, at.batch, at.head, tokens) + at.part.to(tl.int64) * dq.stride
            store_tile(rows, grad, tokens.valid, 0, p.q.width, p.block_d)
        if p.window.lag == 1:
            k_old, v_old = k, v

    store_map_gradients(p, p.map_q, dw, db, own_weight, d_bias, program)
    if d_gate is not None:
        tl.store(d_gate + program, tl.sum(total_dm, 0))
    if dk_sink is not None:
        r, d = tl.arange(0, p.window.sink_block), tl.arange(0, p.block_d)
        cells = dk_sink + (program * p.window.sink_block + r)[:, None] * p.block_d + d[None, :]
        tl.store(cells, dk_first)
        column = tl.arange(0, p.block_v)
        cells = dv_sink + (program * p.window.sink_block + r)[:, None] * p.block_v + column[None, :]
        tl.store(cells, dv_first)


@triton.jit
def load_queries(p, at, left, incoming, tokens, WITH_SCORES: tl.constexpr):
    """A chunk of queries, with what the first pass left of them."""
    own = statistic(p, at, tokens)
    part = own + at.part.to(tl.int64) * left.slice
    delta = tl.load(left.delta + part, mask=tokens.valid, other=0.0)
    do, factor = load_do(p, at, incoming, tokens), row_factor(p, at, incoming, tokens)
    row = RowGradient(do, factor, delta)
    m, tie = delta, delta
    if WITH_SCORES:
        m = tl.load(left.m + own, mask=tokens.valid, other=0.0)
        tie = tl.load(left.tie + part, mask=tokens.valid, other=0.0)
    return Queries(load_q(p, at, tokens), row, m, tie)


class KeyPass(NamedTuple):
    """Sums of the second pass for a tile of keys."""

    dk: Any  # [C, BLOCK_D], or None where only parameters are asked for
    dv: Any  # [C, BLOCK_V], likewise
    d_phi: Any  # sides of [C, f]


@triton.jit
def add_softmax_queries(p, sums, queries, start, distance, k, v, log2_g):
    """sums with the softmax pairs of a chunk of queries."""
    if sums.dk is None or p.window.size == 0:
        return sums
    else:
        inside, outside = pair_masks(p, start, distance)
        unused, weights, ds = softmax_pairs(p, queries, k, v, inside, log2_g, None)
        dk = product(tl.trans(ds), queries.q, sums.dk, p.arithmetic)
        dv = product(tl.trans(weights), queries.row.do, sums.dv, p.arithmetic)
        return KeyPass(dk, dv, sums.d_phi)


@triton.jit
def add_linear_queries(p, sums, queries, start, distance, phi_q, v, phi_k):
    """sums with the pairs of a chunk of queries that are weighed by features."""
    inside, outside = pair_masks(p, start, distance)
    da = tl.where(outside, weight_gradients(p, queries.row, v), 0.0)
    d_phi = add_product(tl.trans(da), phi_q, sums.d_phi, p.arithmetic)
    if sums.dv is None:
        return KeyPass(sums.dk, sums.dv, d_phi)
    else:
        weights = linear_weights(phi_q, phi_k, outside, p.arithmetic)
        weights *= queries.row.factor[:, None]
        dv = product(tl.trans(weights), queries.row.do, sums.dv, p.arithmetic)
        return KeyPass(sums.dk, dv, d_phi)


@triton.jit
def query_features(p, at, tokens, q, weight_q, factor):
    """lambda phi_q of a chunk as an operand of products, [C, f] for each side."""
    rows = rows_of(p.q, at.batch, at.head, tokens)
    z = project(q, rows, tokens.valid, weight_q, p.map_q, at.head, p.arithmetic)
    plus = scaled(clamp_side(activate_side(z, p.map_q), p.map_q), factor).to(p.arithmetic.dtype)
    if p.map_q.two_sided:
        minus = scaled(clamp_side(activate_side(-z, p.map_q), p.map_q), factor)
        return Sides(plus, minus.to(p.arithmetic.dtype))
    else:
        return Sides(plus, None)


@triton.jit
def add_queries(p, state, phi_q, row):
    """The state's gradient with phi_q^T do / den and -phi_q^T delta of a chunk."""
    return add_rows(p, state, phi_q, row.do * row.factor[:, None], -row.delta)


@triton.jit
def absorb_chunks(p, at, state, begin, end, left, incoming, weight_q, factor):
    """The state's gradient with the chunks [begin, end)."""
    for c in tl.range(begin, end, disable_licm=True):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        queries = load_queries(p, at, left, incoming, tokens, False)
        phi_q = query_features(p, at, tokens, queries.q, weight_q, factor)
        state = add_queries(p, state, phi_q, queries.row)
    return state


@triton.jit
def add_far_queries(p, at, sums, t, left, incoming, k, v, phi_k, weight_q, factor, log2_g):
    """sums with the chunks after t whose state does not hold tile t."""
    last = tl.minimum(end_chunk(p, t), tl.cdiv(at.length, p.chunk))
    for c in tl.range(t + 1, last, disable_licm=True):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        queries = load_queries(p, at, left, incoming, tokens, sums.dk is not None)
        sums = add_softmax_queries(p, sums, queries, c * p.chunk, (c - t) * p.chunk, k, v, log2_g)
        if p.window.far_linear:
            if t * p.chunk < window_start(p.window, c * p.chunk + p.chunk - 1):
                phi_q = query_features(p, at, tokens, queries.q, weight_q, factor)
                sums = add_linear_queries(
                    p, sums, queries, c * p.chunk, (c - t) * p.chunk, phi_q, v, phi_k
                )
    return sums


@triton.jit
def backward_keys(
    p, incoming, left, dkv1, dksum1, dk, dv, d_weight, d_bias, dkv0, dksum0, dk_sink, dv_sink
):  # fmt: skip
    """dk, dv, the gradients of map_k and of the initial state.

    dkv1, dksum1: the state's gradient at the end of every segment, [N, H, segments, F, V] and
    [N, H, segments, slices, F]. dk has a part for each slice and query head of a group, dv one for
    each query head. dkv0, dksum0: [N, H, F, V] and [N, H, slices, F], or None. The rest is as in
    backward_queries.
    """
    at = place_of(p)
    begin, end = chunk_range(p, at)
    program = tl.program_id(0).to(tl.int64)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    log2_g, factor = log2_gate(p, at), linear_factor(p, at)
    state = load_state(p, at, dkv1, dksum1, at.slot, True)
    dw, db = None, None
    own_weight = None
    if d_weight is not None:
        own_weight = d_weight + program * (p.map_k.head_dim * p.map_k.width)
        if p.map_k.resident:
            dw = tl.zeros((p.block_d, p.map_k.block), tl.float32)
    if d_bias is not None:
        db = tl.zeros((p.map_k.block,), tl.float32)
    WITH_INPUTS: tl.constexpr = dk is not None
    newer = None
    if p.window.lag == 1:
        newer = load_queries(
            p, at, left, incoming, tokens_at(p, at, end * p.chunk, p.chunk), WITH_INPUTS
        )

    for step in tl.range(0, end - begin, disable_licm=True):
        t = end - 1 - step
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        j = tokens.position
        k, v = load_k(p, at, tokens), load_v(p, at, tokens)
        k_rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
        phi_k = key_features(p, at, tokens, k, weight_k)
        ones = tl.full((p.chunk,), 1.0, tl.float32)
        d_phi = state_product(p, v, ones, -ones, state)
        if WITH_INPUTS:
            key_dv = product(phi_k.plus, state.kv.plus, None, p.arithmetic)
            if p.map_k.two_sided:
                key_dv = product(phi_k.minus, state.kv.minus, key_dv, p.arithmetic)
            if p.window.sink > 0:
                key_dv = tl.where(folds(p, tokens)[:, None], key_dv, 0.0)
            key_dk = tl.zeros((p.chunk, p.block_d), tl.float32)
            sums = KeyPass(key_dk, key_dv, d_phi)
        else:
            sums = KeyPass(None, None, d_phi)

        queries = load_queries(p, at, left, incoming, tokens, WITH_INPUTS)
        sums = add_softmax_queries(p, sums, queries, t * p.chunk, 0, k, v, log2_g)
        if p.window.near_linear:
            phi_near = query_features(p, at, tokens, queries.q, weight_q, factor)
            sums = add_linear_queries(p, sums, queries, t * p.chunk, 0, phi_near, v, phi_k)
        if p.window.lag == 0:
            state = add_queries(p, state, phi_near, queries.row)
        elif p.window.lag == 1:
            start = (t + 1) * p.chunk
            after = tokens_at(p, at, start, p.chunk)
            sums = add_softmax_queries(p, sums, newer, start, p.chunk, k, v, log2_g)
            phi_far = query_features(p, at, after, newer.q, weight_q, factor)
            if p.window.far_linear:
                sums = add_linear_queries(p, sums, newer, start, p.chunk, phi_far, v, phi_k)
            state = add_queries(p, state, phi_far, newer.row)
            newer = queries
        else:
            sums = add_far_queries(
                p, at, sums, t, left, incoming, k, v, phi_k, weight_q, factor, log2_g
            )
            if t > 0:
                last = tl.minimum(end_chunk(p, t), tl.cdiv(at.length, p.chunk))
                first = tl.minimum(end_chunk(p, t - 1), last)
                state = absorb_chunks(p, at, state, first, last, left, incoming, weight_q, factor)

        d_phi = keep_rows(sums.d_phi, folds(p, tokens))
        tile = map_tile(p, k, k_rows, tokens.valid, weight_k, p.map_k, at.head)
        phi = activate(tile.z, p.map_k)
        grad, dw, dz = map_gradient(p, tile, phi, p.map_k, at.head, d_phi, sums.dk, dw, own_weight)
        if d_bias is not None:
            db += tl.sum(dz, 0)
        if WITH_INPUTS:
            group = (at.head % p.group).to(tl.int64)
            key_dv = sums.dv
            if dk_sink is not None:
                if t * p.chunk < p.window.sink:
                    grad, key_dv = add_sink_gradients(p, at, dk_sink, dv_sink, j, grad, key_dv)
            rows = rows_of(dk.rows, at.batch, at.head // p.group, tokens)
            rows += (at.part * p.group + group) * dk.stride
            store_tile(rows, grad, tokens.valid, 0, p.k.width, p.block_d)
            rows = rows_of(dv.rows, at.batch, at.head // p.group, tokens) + group * dv.stride
            store_tile(rows, key_dv, tokens.valid, at.column, p.v.width, p.block_v)

    store_map_gradients(p, p.map_k, dw, db, own_weight, d_bias, program)
    if dkv0 is not None:
        if at.segment == 0:
            store_state(p, at, dkv0, dksum0, at.n * p.heads + at.head, state, True)


@triton.jit
def add_sink_gradients(p, at, dk_sink, dv_sink, j, dk, dv):
    """(dk, dv) with what the first pass found for the sinks among the keys j, in all segments."""
    sink = (j < p.window.sink) & (j < at.length)
    d, column = tl.arange(0, p.block_d), tl.arange(0, p.block_v)
    head = (at.n * p.heads + at.head).to(tl.int64) * p.segments
    for segment in tl.range(p.segments, disable_licm=True):
        row = ((head + segment) * p.slices + at.part) * p.window.sink_block + j
        cells = dk_sink + row[:, None] * p.block_d + d[None, :]
        dk += tl.load(cells, mask=sink[:, None], other=0.0)
        cells = dv_sink + row[:, None] * p.block_v + column[None, :]
        dv += tl.load(cells, mask=sink[:, None], other=0.0)
    return dk, dv


@triton.jit
def segment_gradients(p, incoming, left, dkv, dksum):
    """What the queries of every segment add to the state's gradient, in the order of keys."""
    at = place_of(p)
    begin, end = chunk_range(p, at)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    last = tl.minimum(end_chunk(p, end - 1), tl.cdiv(at.length, p.chunk))
    first = tl.minimum(end_chunk(p, begin - 1), last)
    state = absorb_chunks(
        p, at, empty_state(p), first, last, left, incoming, weight_q, linear_factor(p, at)
    )
    store_state(p, at, dkv, dksum, at.slot, state, True)
