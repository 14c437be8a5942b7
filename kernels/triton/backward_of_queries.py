"""The first pass of attention backward, forward in time: dq, the gradients of the queries' map and
of the gate, and the sinks'. backward_pass.py has the formulas."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward_pass import (
    Queries,
    RowGradient,
    add_product,
    center_of,
    centered,
    incoming_of,
    softmax_pairs,
    state_product,
    weight_gradients,
)
from .carried import carried_on, packed_keys, packed_keys_before, unpacked_tile, unpacked_tiles
from .features import activate, clamp, dot_rows, load_weight, product, scaled, times
from .forward import linear_factor, log2_gate, scores
from .map_gradient import (
    map_gradient,
    map_tile,
    share_of,
    store_map_gradients,
    zero_bias,
    zero_weight,
)
from .problem import INF, Sides
from .state import absorb, absorb_carried, absorb_tiles, key_features, load_state
from .tokens import (
    chunk_of,
    chunk_range,
    load_k,
    load_q,
    load_v,
    place_of,
    rows_of,
    statistic,
    store_tile,
    tokens_at,
)
from .window import (
    causal_pairs,
    first_tile,
    has_linear,
    has_older,
    older_masks,
    own_masks,
    sink_mask,
    weighs,
    window_start,
)


class SoftmaxSums(NamedTuple):
    """Sums over the keys that a chunk of queries attends by softmax, under their maximum so far."""

    m: Any  # [C], in units of log2 e
    ties: Any  # [C], how many keys have it
    weights: Any  # [C], of exp(s - m)
    gradients: Any  # [C], of exp(s - m) do . v


class QueryGradient(NamedTuple):
    """dq of a chunk, and what the ds that it was made of add up to in each query."""

    rows: Any  # [C, BLOCK_D]
    sums: Any  # [C]


@triton.jit
def add_softmax_pairs(p, sums, q, do, k, v, inside):
    """sums with a tile of keys."""
    s = tl.where(inside, scores(p, q, k), -INF)
    top = tl.maximum(sums.m, tl.max(s, 1))
    hits = tl.sum(tl.where(inside & (s == top[:, None]), 1.0, 0.0), 1)
    ties = tl.where(sums.m == top, sums.ties, 0.0) + hits
    m = tl.where(top == -INF, 0.0, top)
    rescale, weights = tl.exp2(sums.m - m), tl.exp2(s - m[:, None])
    gradients = weights * product(do, tl.trans(v), None, p.arithmetic)
    return SoftmaxSums(
        top,
        ties,
        sums.weights * rescale + tl.sum(weights, 1),
        sums.gradients * rescale + tl.sum(gradients, 1),
    )


@triton.jit
def linear_pairs(p, row, v, phi_k, outside, d_phi):
    """d_phi with the pairs of a tile that are weighed by features."""
    da = tl.where(outside, weight_gradients(p, row, v), 0.0)
    return add_product(da, phi_k, d_phi, p.arithmetic)


@triton.jit
def far_pairs(p, at, row, c, weight_k, d_phi):
    """d_phi with the tiles before c, read again."""
    near = window_start(p.window, c * p.chunk + p.chunk - 1)
    start = first_tile(p, c)
    for t in tl.range(start, tl.minimum(c, tl.cdiv(near, p.chunk)), disable_licm=True):
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        phi_k = key_features(p, at, tokens, load_k(p, at, tokens), weight_k)
        inside, outside = older_masks(p, c * p.chunk, (c - t) * p.chunk, p.window.far_linear)
        d_phi = linear_pairs(p, row, load_v(p, at, tokens), phi_k, outside, d_phi)
    return d_phi


@triton.jit
def softmax_sums(p, at, causal, q, do, i, c, k, v, carried):
    """Over all keys that a chunk of queries attends by softmax; m is 0 where there are none."""
    zero = tl.zeros((p.chunk,), tl.float32)
    sums = SoftmaxSums(zero - INF, zero, zero, zero)
    if p.window.sink > 0:
        first = tokens_at(p, at, 0, p.window.sink_block)
        inside = sink_mask(p, at, i, first.position)
        sums = add_softmax_pairs(p, sums, q, do, load_k(p, at, first), load_v(p, at, first), inside)
    if p.window.size > 0:
        inside, outside = own_masks(p, causal, c * p.chunk)
        sums = add_softmax_pairs(p, sums, q, do, k, v, inside)
        for back in tl.static_range(1, p.window.carried + 1):
            for _ in tl.range(weighs(p, c, back), disable_licm=True):
                tile = unpacked_tile(carried[back - 1], q.dtype)
                inside, outside = older_masks(p, c * p.chunk, back * p.chunk, has_linear(p, back))
                sums = add_softmax_pairs(p, sums, q, do, tile.k, tile.v, inside)
        if p.window.read_again:
            for t in tl.range(first_tile(p, c), c, disable_licm=True):
                far = tokens_at(p, at, t * p.chunk, p.chunk)
                inside, outside = older_masks(
                    p, c * p.chunk, (c - t) * p.chunk, p.window.far_linear
                )
                k_far, v_far = load_k(p, at, far), load_v(p, at, far)
                sums = add_softmax_pairs(p, sums, q, do, k_far, v_far, inside)
    m = tl.where(sums.m == -INF, 0.0, sums.m)
    return SoftmaxSums(m, tl.maximum(sums.ties, 1.0), sums.weights, sums.gradients)


@triton.jit
def add_scores(p, dq, ds, k):
    """dq with the gradients of a tile's scores."""
    ds = (ds * p.scale).to(p.arithmetic.dtype)
    sums = dq.sums
    if p.arithmetic.dtype != tl.float32:
        sums += tl.sum(ds.to(tl.float32), 1)
    return QueryGradient(product(ds, k, dq.rows, p.arithmetic), sums)


@triton.jit
def corrected(p, at, dq, c, k):
    """dq, [C, BLOCK_D], without what the ds add up to, which is 0 before they are rounded, times a
    mean of keys."""
    if p.arithmetic.dtype != tl.float32:
        of_each = 1.0 / tl.minimum(at.length - c * p.chunk, p.chunk)
        return dq.rows - dq.sums[:, None] * (tl.sum(k.to(tl.float32), 0) * of_each)[None, :]
    else:
        return dq.rows


@triton.jit
def add_softmax_keys(p, dq, queries, k, v, inside, log2_g):
    """dq with a tile of keys."""
    weights, ds = softmax_pairs(p, queries, k, v, inside, log2_g)
    return add_scores(p, dq, ds, k)


@triton.jit
def window_pairs(p, at, causal, queries, c, k, v, carried, log2_g, dq):
    """dq with the pairs in the windows of a chunk."""
    if p.window.size > 0:
        inside, outside = own_masks(p, causal, c * p.chunk)
        dq = add_softmax_keys(p, dq, queries, k, v, inside, log2_g)
        for back in tl.static_range(1, p.window.carried + 1):
            for _ in tl.range(weighs(p, c, back), disable_licm=True):
                tile = unpacked_tile(carried[back - 1], queries.q.dtype)
                inside, outside = older_masks(p, c * p.chunk, back * p.chunk, has_linear(p, back))
                dq = add_softmax_keys(p, dq, queries, tile.k, tile.v, inside, log2_g)
        if p.window.read_again:
            for t in tl.range(first_tile(p, c), c, disable_licm=True):
                far = tokens_at(p, at, t * p.chunk, p.chunk)
                inside, outside = older_masks(
                    p, c * p.chunk, (c - t) * p.chunk, p.window.far_linear
                )
                k_far, v_far = load_k(p, at, far), load_v(p, at, far)
                dq = add_softmax_keys(p, dq, queries, k_far, v_far, inside, log2_g)
    return dq


@triton.jit
def without_excess(d_phi, excess, ksum):
    """d_phi - excess ksum^T, [C, f] for both sides."""
    plus = d_phi.plus - excess[:, None] * ksum.plus[None, :]
    if d_phi.minus is None:
        return Sides(plus, None)
    else:
        return Sides(plus, d_phi.minus - excess[:, None] * ksum.minus[None, :])


@triton.jit
def backward_queries(p, incoming, left, kv0, ksum0, dq, d_weight, d_bias, d_gate, dk_sink, dv_sink):
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
    state = load_state(p, at, kv0, ksum0, at.index, False)
    own_weight = share_of(p.map_q, d_weight, program)
    dw, db = zero_weight(p, p.map_q, d_weight), zero_bias(p.map_q, d_bias)
    total_dm = tl.zeros((p.chunk,), tl.float32)
    if dk_sink is not None:
        dk_first = tl.zeros((p.window.sink_block, p.block_d), tl.float32)
        dv_first = tl.zeros((p.window.sink_block, p.block_v), tl.float32)
    center = tl.zeros((p.block_v,), tl.float32)
    causal = causal_pairs(p)
    carried = packed_keys_before(p, at, begin)

    for turn in tl.range(begin, end, disable_licm=True):
        c = chunk_of(at, turn)
        before, now = first_tile(p, c - 1), first_tile(p, c)
        renew = (c == begin) | (before ^ now > before)  # now, tiles of the state, has one bit more
        for _ in tl.range(renew.to(tl.int32), disable_licm=True):  # a branch spills twice as much
            center = center_of(state)
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        i = tokens.position
        q = load_q(p, at, tokens)
        q_rows = rows_of(p.q, at.batch, at.head, tokens)
        row = incoming_of(p, at, incoming, tokens)
        older = unpacked_tiles(p, carried, q.dtype)
        part = statistic(p, at, tokens) + at.part.to(tl.int64) * left.slice

        ksum = state.ksum
        of_center = tl.sum(row.do.to(tl.float32) * center[None, :], 1) * row.factor
        d_phi = state_product(p, row.do, row.factor, row.delta - of_center, centered(state, center))
        for back in tl.static_range(1, p.window.carried + 1):
            old = tokens_at(p, at, (c - back) * p.chunk, p.chunk)
            tile = older[back - 1]
            if has_linear(p, back):
                phi_old = key_features(p, at, old, tile.k, weight_k)
                inside, outside = older_masks(p, c * p.chunk, back * p.chunk, True)
                d_phi = linear_pairs(p, row, tile.v, phi_old, outside, d_phi)
                state = absorb_carried(p, at, state, c, back, old, tile, phi_old, weight_k)
            else:
                state = absorb_carried(p, at, state, c, back, old, tile, None, weight_k)
        if p.window.read_again:
            if p.window.far_linear:
                d_phi = far_pairs(p, at, row, c, weight_k, d_phi)
            state = absorb_tiles(p, at, state, first_tile(p, c), first_tile(p, c + 1), weight_k)
        k, v = load_k(p, at, tokens), load_v(p, at, tokens)
        if p.window.near_linear:
            phi_k = key_features(p, at, tokens, k, weight_k)
            inside, outside = own_masks(p, causal, c * p.chunk)
            d_phi = linear_pairs(p, row, v, phi_k, outside, d_phi)
        if not has_older(p):
            state = absorb(p, state, tokens, phi_k, v)

        d_phi = times(d_phi, factor)
        WITH_SOFTMAX: tl.constexpr = dq is not None and p.window.size + p.window.sink > 0
        if WITH_SOFTMAX:
            sums = softmax_sums(p, at, causal, q, row.do, i, c, k, v, carried)
        tile = map_tile(p, q, q_rows, tokens.valid, weight_q, p.map_q, at.head)
        phi = activate(tile.z, p.map_q)
        dm = tl.where(tokens.valid, dot_rows(clamp(phi, p.map_q), d_phi), 0.0)
        if incoming.out is not None:  # what delta is off by, times den
            off, share = dm - incoming.eps * row.delta, 0.0
            if WITH_SOFTMAX:
                g = tl.exp2(log2_g)
                off += g * (sums.gradients * row.factor - sums.weights * row.delta)
                share = g * sums.weights * row.factor
            excess = off * row.factor
            row = RowGradient(row.do, row.factor, row.delta + excess)
            dm -= (1.0 - share) * off
            less = scaled(excess, factor)
            d_phi = without_excess(d_phi, less, ksum)
            if p.window.near_linear:
                inside, outside = own_masks(p, causal, c * p.chunk)
                pairs = tl.where(outside, -less[:, None], 0.0)
                d_phi = add_product(pairs, phi_k, d_phi, p.arithmetic)
        tl.store(left.delta + part, row.delta, mask=tokens.valid)
        grad = None
        if dq is not None:
            grad = tl.zeros((p.chunk, p.block_d), tl.float32)
        grad, dw, dz = map_gradient(p, tile, phi, p.map_q, at.head, d_phi, grad, dw, own_weight)
        if d_bias is not None:
            db += tl.sum(dz, 0)

        if dq is not None:
            if WITH_SOFTMAX:
                queries = Queries(q, row, sums.m, dm / sums.ties)
                tl.store(left.tie + part, queries.tie, mask=tokens.valid)
                if at.part == 0:
                    tl.store(left.m + statistic(p, at, tokens), sums.m, mask=tokens.valid)
                sum_dq = QueryGradient(grad, tl.zeros((p.chunk,), tl.float32))
                if p.window.sink > 0:
                    first = tokens_at(p, at, 0, p.window.sink_block)
                    inside = sink_mask(p, at, i, first.position) & tokens.valid[:, None]
                    keys_first, v_first = load_k(p, at, first), load_v(p, at, first)
                    weights, ds = softmax_pairs(p, queries, keys_first, v_first, inside, log2_g)
                    sum_dq = add_scores(p, sum_dq, ds, keys_first)
                    dk_first = product(tl.trans(ds * p.scale), q, dk_first, p.arithmetic)
                    dv_first = product(tl.trans(weights), row.do, dv_first, p.arithmetic)
                sum_dq = window_pairs(p, at, causal, queries, c, k, v, carried, log2_g, sum_dq)
                grad = corrected(p, at, sum_dq, c, k)
            rows = rows_of(dq.rows, at.batch, at.head, tokens) + at.part.to(tl.int64) * dq.stride
            store_tile(rows, grad, tokens.valid, 0, p.q.width, p.block_d)
        total_dm += dm
        carried = carried_on(p, packed_keys(k, v), carried)

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
