"""Attention forward: one pass over the tokens, the state in registers.

A program takes a sequence, a query head, BLOCK_V columns of the values and a segment of the chunks:

    y_c = (tiles first_tile(c) .. c, pair by pair, + phi_q(q_c) . state) / the same with v = 1
    state += tiles first_tile(c) .. first_tile(c + 1) - 1

Sinks come first, then tiles from the newest to the oldest. A query so meets all its softmax keys
before its first linear one, and the running maximum, by which the sums are rescaled, is final when
the linear part, which must not be rescaled (SPEC 3), joins them.

Where the oldest tile is at most one chunk back, it is carried in registers and q, k and v are read
once. Its features then serve the pairs and the state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .features import dot_rows, features, keep_rows, load_weight, product, times
from .problem import INF, LN2, LOG2E, Sums
from .state import absorb, empty_state, ksum_rows, load_state, read_state, store_state
from .tokens import (
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
from .window import first_tile, folds, pair_masks, sink_mask, window_start


@triton.jit
def log2_gate(p, at):
    """log2 of g, the factor of the softmax part; 0 where there is no gate."""
    if p.gate is None:
        return 0.0
    else:
        return -tl.log2(1.0 + tl.exp2(-tl.load(p.gate + at.head) * LOG2E))


@triton.jit
def linear_factor(p, at):
    """lambda, or the scale of linear attention; None for 1."""
    if p.gate is None:
        return p.scale
    elif p.affine:
        return 1.0 / (1.0 + tl.exp2(tl.load(p.gate + at.head) * LOG2E))
    else:
        return None


@triton.jit
def scores(p, q, k):
    """scale q . k in units of log2 e, [queries, keys]: exp2 of it is exp(scale q . k)."""
    s = tl.dot(q, tl.trans(k), input_precision=p.arithmetic.precision)
    return s * (p.scale * LOG2E)


@triton.jit
def add_softmax(sums, s, inside, log2_g, v, arithmetic):
    """sums with a tile of softmax keys."""
    s = tl.where(inside, s, -INF)
    m = tl.maximum(sums.m, tl.max(s, 1))
    rescale = tl.exp2(sums.m - m)
    weights = tl.exp2(s - (m - log2_g)[:, None])
    den = sums.den * rescale + tl.sum(weights, 1)
    acc = product(weights, v, sums.acc * rescale[:, None], arithmetic)
    return Sums(m, den, acc)


@triton.jit
def linear_weights(phi_q, phi_k, outside, arithmetic):
    """phi_q . phi_k of the pairs that are weighed by features, [queries, keys]."""
    a = product(phi_q.plus, tl.trans(phi_k.plus), None, arithmetic)
    if phi_q.minus is not None:
        a = product(phi_q.minus, tl.trans(phi_k.minus), a, arithmetic)
    return tl.where(outside, a, 0.0)


@triton.jit
def add_linear(sums, phi_q, phi_k, outside, v, arithmetic):
    """sums with a tile of keys that are weighed by features."""
    weights = linear_weights(phi_q, phi_k, outside, arithmetic)
    return Sums(sums.m, sums.den + tl.sum(weights, 1), product(weights, v, sums.acc, arithmetic))


@triton.jit
def add_both(p, sums, s, phi_q, phi_k, inside, outside, log2_g, v):
    """sums with a tile of keys of both kinds: their weights share one product with the values."""
    s = tl.where(inside, s, -INF)
    m = tl.maximum(sums.m, tl.max(s, 1))
    rescale = tl.exp2(sums.m - m)
    weights = tl.exp2(s - (m - log2_g)[:, None])
    weights += linear_weights(phi_q, phi_k, outside, p.arithmetic)
    den = sums.den * rescale + tl.sum(weights, 1)
    acc = product(weights, v, sums.acc * rescale[:, None], p.arithmetic)
    return Sums(m, den, acc)


@triton.jit
def add_tile(p, at, sums, q, phi_q, i, k, v, phi_k, j, log2_g):
    """sums with a tile of keys; with phi_k of None, with its softmax keys alone."""
    inside, outside = pair_masks(p, at, i, j)
    if p.window.size == 0:
        return add_linear(sums, phi_q, phi_k, outside, v, p.arithmetic)
    elif phi_k is None:
        return add_softmax(sums, scores(p, q, k), inside, log2_g, v, p.arithmetic)
    else:
        s = scores(p, q, k)
        return add_both(p, sums, s, phi_q, phi_k, inside, outside, log2_g, v)


@triton.jit
def add_sinks(p, at, sums, q, i, log2_g):
    """sums with the sinks."""
    tokens = tokens_at(p, at, 0, p.window.sink_block)
    s = scores(p, q, load_k(p, at, tokens))
    inside = sink_mask(p, at, i, tokens.position)
    return add_softmax(sums, s, inside, log2_g, load_v(p, at, tokens), p.arithmetic)


@triton.jit
def key_features(p, at, tokens, k, weight_k):
    rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
    return features(k, rows, tokens.valid, weight_k, p.map_k, at.head, p.arithmetic)


@triton.jit
def query_features(p, at, tokens, q, weight_q):
    rows = rows_of(p.q, at.batch, at.head, tokens)
    return features(q, rows, tokens.valid, weight_q, p.map_q, at.head, p.arithmetic)


@triton.jit
def add_far_tiles(p, at, sums, q, phi_q, i, c, weight_k, log2_g):
    """sums with the tiles before c, read again: windows that reach back over more than a tile."""
    start = first_tile(p, c)
    near = window_start(p.window, c * p.chunk + p.chunk - 1)  # older keys are linear to some query
    for back in range(1, c - start + 1):
        t = c - back
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        k, v = load_k(p, at, tokens), load_v(p, at, tokens)
        inside, outside = pair_masks(p, at, i, tokens.position)
        sums = add_softmax(sums, scores(p, q, k), inside, log2_g, v, p.arithmetic)
        if p.window.far_linear:
            if t * p.chunk < near:
                phi_k = key_features(p, at, tokens, k, weight_k)
                sums = add_linear(sums, phi_q, phi_k, outside, v, p.arithmetic)
    return sums


@triton.jit
def absorb_tiles(p, at, state, begin, end, weight_k):
    """The state with the tiles [begin, end)."""
    for t in range(begin, end):
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        k, v = load_k(p, at, tokens), load_v(p, at, tokens)
        phi_k = keep_rows(key_features(p, at, tokens, k, weight_k), folds(p, tokens))
        state = absorb(state, phi_k, v, p.arithmetic)
    return state


@triton.jit
def attention_forward(p, out, m_ptr, den_ptr, kv0, ksum0, kv1, ksum1, eps, NORMALIZE: tl.constexpr):
    """y; and of every query m (SPEC 3, in natural units) and den.

    kv0, ksum0: the state at the start of every segment, [N, H, segments, F, V] and [..., F].
    kv1, ksum1: where the state after the last token goes, [N, H, F, V] and [N, H, F].
    Either may be None. eps is added to den.
    """
    at = place_of(p)
    w = p.window
    begin, end = chunk_range(p, at)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    log2_g, factor = log2_gate(p, at), linear_factor(p, at)
    state = load_state(p, at, kv0, ksum0, at.slot)
    if w.lag == 1:
        old = tokens_at(p, at, (begin - 1) * p.chunk, p.chunk)
        k_old, v_old = load_k(p, at, old), load_v(p, at, old)

    for c in range(begin, end):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        i = tokens.position
        q, k, v = load_q(p, at, tokens), load_k(p, at, tokens), load_v(p, at, tokens)
        phi_q = times(query_features(p, at, tokens, q, weight_q), factor)
        sums = Sums(
            tl.full((p.chunk,), -INF, tl.float32),
            tl.zeros((p.chunk,), tl.float32),
            tl.zeros((p.chunk, p.block_v), tl.float32),
        )
        if w.sink > 0:
            sums = add_sinks(p, at, sums, q, i, log2_g)

        phi_k = None
        if w.near_linear:
            phi_k = key_features(p, at, tokens, k, weight_k)
        sums = add_tile(p, at, sums, q, phi_q, i, k, v, phi_k, i, log2_g)
        if w.lag == 1:
            old = tokens_at(p, at, (c - 1) * p.chunk, p.chunk)
            phi_old = key_features(p, at, old, k_old, weight_k)
            phi_far = phi_old
            if not w.far_linear:
                phi_far = None
            sums = add_tile(p, at, sums, q, phi_q, i, k_old, v_old, phi_far, old.position, log2_g)
        elif w.lag == 2:
            sums = add_far_tiles(p, at, sums, q, phi_q, i, c, weight_k, log2_g)

        acc = read_state(state, phi_q, sums.acc, p.arithmetic)
        den = sums.den + dot_rows(phi_q, ksum_rows(state)) + eps
        if NORMALIZE:
            acc *= (1.0 / den)[:, None]
        o_rows = rows_of(out, at.batch, at.head, tokens)
        store_tile(o_rows, acc, tokens.valid, at.column, out.width, p.block_v)
        if at.part == 0:
            own = statistic(p, at, tokens)
            tl.store(den_ptr + own, den, mask=tokens.valid)
            if m_ptr is not None:
                m = tl.where(sums.m == -INF, 0.0, sums.m * LN2)
                tl.store(m_ptr + own, m, mask=tokens.valid)

        if w.lag == 0:
            state = absorb(state, keep_rows(phi_k, folds(p, tokens)), v, p.arithmetic)
        elif w.lag == 1:
            state = absorb(state, keep_rows(phi_old, folds(p, old)), v_old, p.arithmetic)
            k_old, v_old = k, v
        else:
            state = absorb_tiles(p, at, state, first_tile(p, c), first_tile(p, c + 1), weight_k)

    if kv1 is not None:
        if at.segment == p.segments - 1:
            store_state(p, at, kv1, ksum1, at.n * p.heads + at.head, state)


@triton.jit
def segment_sums(p, kv, ksum):
    """What every segment adds to the state, [N, H, segments, F, V] and [..., F]."""
    at = place_of(p)
    begin, end = chunk_range(p, at)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    state = absorb_tiles(p, at, empty_state(p), first_tile(p, begin), first_tile(p, end), weight_k)
    store_state(p, at, kv, ksum, at.slot, state)


@triton.jit
def exclusive_sums(
    x, initial, size, COUNT: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """x [rows, COUNT, size]: each of the COUNT becomes the sum of those before it (after it, in
    REVERSE), in place, on top of ``initial`` [rows, size] or 0."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        total = tl.load(initial + row * size + column, mask=mask, other=0.0)
    for step in range(COUNT):
        n = step
        if REVERSE:
            n = COUNT - 1 - step
        cell = x + (row * COUNT + n) * size + column
        own = tl.load(cell, mask=mask, other=0.0)
        tl.store(cell, total, mask=mask)
        total += own
