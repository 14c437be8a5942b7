"""The second pass of attention backward, backward in time: dk, dv and the gradients of the keys'
map and of the initial state. backward_pass.py has the formulas."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward_pass import (
    Queries,
    RowGradient,
    add_product,
    load_do,
    row_factor,
    softmax_pairs,
    state_product,
    weight_gradients,
)
from .carried import carried_on, packed, unpacked
from .features import activate, keep_rows, load_weight, product
from .forward import linear_factor, linear_weights, log2_gate
from .map_gradient import (
    map_gradient,
    map_tile,
    share_of,
    store_map_gradients,
    zero_bias,
    zero_weight,
)
from .problem import Sides, State
from .state import add_rows, empty_state, key_features, load_state, query_features, store_state
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
    end_chunk,
    folds,
    has_linear,
    has_older,
    older_masks,
    own_masks,
    weighs,
    weighs_oldest,
    window_start,
)


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


@triton.jit
def packed_queries(x):
    """The same, to be carried through a loop."""
    return Queries(
        packed(x.q), RowGradient(packed(x.row.do), x.row.factor, x.row.delta), x.m, x.tie
    )


@triton.jit
def unpacked_queries(x, dtype: tl.constexpr, arithmetic):
    """The chunk that was packed; dtype of its q."""
    do = unpacked(x.row.do, arithmetic.dtype)
    return Queries(unpacked(x.q, dtype), RowGradient(do, x.row.factor, x.row.delta), x.m, x.tie)


class KeyPass(NamedTuple):
    """Sums of the second pass for a tile of keys."""

    dk: Any  # [C, BLOCK_D], or None where only parameters are asked for
    dv: Any  # [C, BLOCK_V], likewise
    d_phi: Any  # sides of [C, f]


@triton.jit
def add_softmax_queries(p, sums, queries, inside, k, v, log2_g):
    """sums with the softmax pairs of a chunk of queries."""
    if sums.dk is None or p.window.size == 0:
        return sums
    else:
        weights, ds = softmax_pairs(p, queries, k, v, inside, log2_g)
        dk = product(tl.trans(ds * p.scale), queries.q, sums.dk, p.arithmetic)
        dv = product(tl.trans(weights), queries.row.do, sums.dv, p.arithmetic)
        return KeyPass(dk, dv, sums.d_phi)


@triton.jit
def add_linear_queries(p, sums, queries, outside, phi_q, v, phi_k):
    """sums with the pairs of a chunk of queries that are weighed by features."""
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
def mean_value(p, at, c):
    """The mean of the values of a chunk, [BLOCK_V]."""
    tokens = tokens_at(p, at, c * p.chunk, p.chunk)
    count = tl.sum(tl.where(tokens.valid, 1.0, 0.0), 0)
    return tl.sum(load_v(p, at, tokens).to(tl.float32), 0) / tl.maximum(count, 1.0)


@triton.jit
def lost_in_rounding(p, x, center):
    """What x [n, BLOCK_V] as an operand lacks, times ``center``, [n]."""
    return tl.sum((x - x.to(p.arithmetic.dtype).to(tl.float32)) * center[None, :], 1)


@triton.jit
def add_queries(p, state, phi_q, row, center):
    """The state's gradient with phi_q^T do / den and -phi_q^T delta of a chunk."""
    gradient = row.do * row.factor[:, None]
    delta = row.delta - lost_in_rounding(p, gradient, center)
    return add_rows(p, state, phi_q, gradient, -delta)


@triton.jit
def with_what_rounding_took(p, state, center):
    """The state for a product with values of the mean ``center``: dksum makes up for what is lost
    of that."""
    plus = state.ksum.plus + lost_in_rounding(p, state.kv.plus, center)
    if state.ksum.minus is None:
        return State(state.kv, Sides(plus, None))
    else:
        minus = state.ksum.minus + lost_in_rounding(p, state.kv.minus, center)
        return State(state.kv, Sides(plus, minus))


@triton.jit
def absorb_chunks(p, at, state, begin, end, left, incoming, weight_q, factor, center):
    """The state's gradient with the chunks [begin, end)."""
    for c in tl.range(begin, end, disable_licm=True):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        queries = load_queries(p, at, left, incoming, tokens, False)
        phi_q = query_features(p, at, tokens, queries.q, weight_q, factor)
        state = add_queries(p, state, phi_q, queries.row, center)
    return state


@triton.jit
def add_far_queries(p, at, sums, t, left, incoming, k, v, phi_k, weight_q, factor, log2_g):
    """sums with the chunks after t whose state does not hold tile t."""
    last = tl.minimum(end_chunk(p, t), tl.cdiv(at.length, p.chunk))
    for c in tl.range(t + 1, last, disable_licm=True):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        queries = load_queries(p, at, left, incoming, tokens, sums.dk is not None)
        inside, outside = older_masks(p, c * p.chunk, (c - t) * p.chunk, p.window.far_linear)
        sums = add_softmax_queries(p, sums, queries, inside, k, v, log2_g)
        if p.window.far_linear:
            if t * p.chunk < window_start(p.window, c * p.chunk + p.chunk - 1):
                phi_q = query_features(p, at, tokens, queries.q, weight_q, factor)
                sums = add_linear_queries(p, sums, queries, outside, phi_q, v, phi_k)
    return sums


@triton.jit
def backward_keys(
    p, incoming, left, dkv1, dksum1, dk, dv, d_weight, d_bias, dkv0, dksum0, dk_sink, dv_sink
):
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
    center = mean_value(p, at, end - 1)
    state = load_state(p, at, dkv1, dksum1, at.index, True)
    own_weight = share_of(p.map_k, d_weight, program)
    dw, db = zero_weight(p, p.map_k, d_weight), zero_bias(p.map_k, d_bias)
    WITH_INPUTS: tl.constexpr = dk is not None
    causal = causal_pairs(p)
    carried = ()
    for ahead in tl.static_range(p.window.carried):
        after = tokens_at(p, at, (end + ahead) * p.chunk, p.chunk)
        queries = load_queries(p, at, left, incoming, after, WITH_INPUTS)
        carried = carried + (packed_queries(queries),)

    for step in tl.range(0, end - begin, disable_licm=True):
        t = chunk_of(at, end - 1 - step)
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        j = tokens.position
        k, v = load_k(p, at, tokens), load_v(p, at, tokens)
        k_rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
        phi_k = key_features(p, at, tokens, k, weight_k)
        ones = tl.full((p.chunk,), 1.0, tl.float32)
        d_phi = state_product(p, v, ones, -ones, with_what_rounding_took(p, state, center))
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
        inside, outside = own_masks(p, causal, t * p.chunk)
        sums = add_softmax_queries(p, sums, queries, inside, k, v, log2_g)
        if p.window.near_linear:
            phi_near = query_features(p, at, tokens, queries.q, weight_q, factor)
            sums = add_linear_queries(p, sums, queries, outside, phi_near, v, phi_k)
        if not has_older(p):
            state = add_queries(p, state, phi_near, queries.row, center)
        for ahead in tl.static_range(1, p.window.carried + 1):
            start = (t + ahead) * p.chunk
            after = tokens_at(p, at, start, p.chunk)
            for _ in tl.range(weighs(p, t + ahead, ahead), disable_licm=True):
                newer = unpacked_queries(carried[ahead - 1], k.dtype, p.arithmetic)
                inside, outside = older_masks(p, start, ahead * p.chunk, has_linear(p, ahead))
                sums = add_softmax_queries(p, sums, newer, inside, k, v, log2_g)
            if has_linear(p, ahead):
                newer = unpacked_queries(carried[ahead - 1], k.dtype, p.arithmetic)
                phi_far = query_features(p, at, after, newer.q, weight_q, factor)
                inside, outside = older_masks(p, start, ahead * p.chunk, True)
                sums = add_linear_queries(p, sums, newer, outside, phi_far, v, phi_k)
                for _ in tl.range(weighs_oldest(p, t + ahead, ahead), disable_licm=True):
                    state = add_queries(p, state, phi_far, newer.row, center)
            else:
                for _ in tl.range(weighs_oldest(p, t + ahead, ahead), disable_licm=True):
                    newer = unpacked_queries(carried[ahead - 1], k.dtype, p.arithmetic)
                    phi_far = query_features(p, at, after, newer.q, weight_q, factor)
                    state = add_queries(p, state, phi_far, newer.row, center)
        carried = carried_on(p, packed_queries(queries), carried)
        if p.window.read_again:
            sums = add_far_queries(
                p, at, sums, t, left, incoming, k, v, phi_k, weight_q, factor, log2_g
            )
            if t > 0:
                last = tl.minimum(end_chunk(p, t), tl.cdiv(at.length, p.chunk))
                first = tl.minimum(end_chunk(p, t - 1), last)
                state = absorb_chunks(
                    p, at, state, first, last, left, incoming, weight_q, factor, center
                )

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
    """What the queries of every segment add to the state's gradient, in the order of keys; zeros
    for the first one, before which there are no keys."""
    at = place_of(p)
    begin, end = chunk_range(p, at)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    last = tl.minimum(end_chunk(p, end - 1), tl.cdiv(at.length, p.chunk))
    first = tl.minimum(end_chunk(p, begin - 1), last)
    first = tl.where(at.segment == 0, last, first)
    factor, center = linear_factor(p, at), mean_value(p, at, begin)
    state = empty_state(p)
    state = absorb_chunks(p, at, state, first, last, left, incoming, weight_q, factor, center)
    store_state(p, at, dkv, dksum, at.index, state, True)
