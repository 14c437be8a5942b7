"""Attention forward: one pass over the tokens, the state in registers.

A program takes a sequence, a query head, BLOCK_V columns of the values and a segment of the chunks:

    y_c = (W: tiles by softmax, N: phi_q(q_c) . state + tiles by features) / the same with v = 1
    state += tiles first_tile(c) .. first_tile(c + 1) - 1

The linear part is summed first, apart: the softmax sums are rescaled as their running maximum
grows, and the linear part must not be (SPEC 3).

Where windows reach back no farther than the launch configuration says, their tiles are carried over
from the chunks before (carried.py): q, k and v are read once, and the features of the oldest tile
serve the pairs and the state. Registers bound a chunk's size. So older tiles are done with before
the chunk's own keys and values are loaded, and with one of them what is live at a time is the
state, both sums, a tile of scores, and keys and values of one tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .carried import carried_on, packed_keys, packed_keys_before, unpacked_anew, unpacked_tiles
from .features import at_least, inner_product, load_weight, product
from .problem import INF, LEAST_GATE, LN2, LOG2E, LOWEST, Sums
from .state import (
    absorb,
    absorb_carried,
    absorb_tiles,
    empty_state,
    key_features,
    load_state,
    query_features,
    read_state,
    store_state,
)
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


class Step(NamedTuple):
    """What a tile of scores adds to sums."""

    m: Any  # [queries], the new maximum
    rescale: Any  # [queries], the factor of what was summed under the old one
    weights: Any  # [queries, keys]


@triton.jit
def log2_gate(p, at):
    """log2 of g, the factor of the softmax part; 0 where there is no gate."""
    if p.gate is None:
        return 0.0
    else:
        gate = at_least(tl.load(p.gate + at.head), LEAST_GATE)
        return -tl.log2(1.0 + tl.exp2(-gate * LOG2E))


@triton.jit
def softmax_gate(p, at):
    """g, None for 1."""
    if p.gate is None:
        return None
    else:
        return tl.exp2(log2_gate(p, at))


@triton.jit
def linear_factor(p, at):
    """lambda, or the scale of linear attention; None for 1."""
    if p.gate is None:
        return p.scale
    elif p.affine:
        against = at_least(-tl.load(p.gate + at.head), LEAST_GATE)
        return 1.0 / (1.0 + tl.exp2(-against * LOG2E))
    else:
        return None


@triton.jit
def scores(p, q, k):
    """scale q . k in units of log2 e, [queries, keys]: exp2 of it is exp(scale q . k)."""
    if q.shape[0] == 1:
        s = inner_product(q, k, None, p.arithmetic)
    else:  # in the dtype of q and k
        s = tl.dot(q, tl.trans(k), input_precision=p.arithmetic.precision)
    return s * (p.scale * LOG2E)


@triton.jit
def empty_sums(p, lowest):
    """Sums over no keys, whose maximum is ``lowest``."""
    den = tl.zeros((p.chunk,), tl.float32)
    acc = tl.zeros((p.chunk, p.block_v), tl.float32)
    return Sums(tl.full((p.chunk,), lowest, tl.float32), den, acc)


@triton.jit
def softmax_step(m_before, s):
    """A tile of scores under the maximum of all so far."""
    m = tl.maximum(m_before, tl.max(s, 1))
    return Step(m, tl.exp2(m_before - m), tl.exp2(s - m[:, None]))


@triton.jit
def add_step(sums, step, v, arithmetic):
    """sums with a tile of keys."""
    den = sums.den * step.rescale + tl.sum(step.weights, 1)
    acc = product(step.weights, v, sums.acc * step.rescale[:, None], arithmetic)
    return Sums(step.m, den, acc)


@triton.jit
def add_softmax(sums, s, inside, v, arithmetic):
    """sums with a tile of softmax keys."""
    return add_step(sums, softmax_step(sums.m, tl.where(inside, s, -INF)), v, arithmetic)


@triton.jit
def feature_products(a, b, arithmetic):
    """a . b over the features of both sides: [n, f] and [m, f] to [n, m]."""
    y = inner_product(a.plus, b.plus, None, arithmetic)
    if a.minus is not None:
        y = inner_product(a.minus, b.minus, y, arithmetic)
    return y


@triton.jit
def linear_weights(phi_q, phi_k, outside, arithmetic):
    """phi_q . phi_k of the pairs that are weighed by features, [queries, keys]."""
    return tl.where(outside, feature_products(phi_q, phi_k, arithmetic), 0.0)


@triton.jit
def add_linear(sums, phi_q, phi_k, outside, v, arithmetic):
    """sums with a tile of keys that are weighed by features."""
    # den sums what the product sees: a query with one key then gets its value, not nearly.
    weights = linear_weights(phi_q, phi_k, outside, arithmetic).to(arithmetic.dtype)
    den = sums.den + tl.sum(weights.to(tl.float32), 1)
    return Sums(sums.m, den, product(weights, v, sums.acc, arithmetic))


@triton.jit
def softmax_before(p, at, q, carried, i, c):
    """Sums over what a chunk attends by softmax in the tiles before it, and over the sinks."""
    sums = empty_sums(p, LOWEST)
    if p.window.sink > 0:
        first = tokens_at(p, at, 0, p.window.sink_block)
        s_first, v_first = scores(p, q, load_k(p, at, first)), load_v(p, at, first)
        sinks = sink_mask(p, at, i, first.position)
        sums = add_softmax(sums, s_first, sinks, v_first, p.arithmetic)
    for back in tl.static_range(1, p.window.carried + 1):
        for _ in tl.range(weighs(p, c, back), disable_licm=True):
            tile = unpacked_anew(carried[back - 1], q.dtype, c)
            inside, outside = older_masks(p, c * p.chunk, back * p.chunk, has_linear(p, back))
            sums = add_softmax(sums, scores(p, q, tile.k), inside, tile.v, p.arithmetic)
    if p.window.read_again:
        for t in tl.range(first_tile(p, c), c, disable_licm=True):
            tokens = tokens_at(p, at, t * p.chunk, p.chunk)
            s, v_far = scores(p, q, load_k(p, at, tokens)), load_v(p, at, tokens)
            inside, outside = older_masks(p, c * p.chunk, (c - t) * p.chunk, p.window.far_linear)
            sums = add_softmax(sums, s, inside, v_far, p.arithmetic)
    return sums


@triton.jit
def gated_sum(gate, sums, linear):
    """g * sums + linear. The gate comes last: the largest weight of a query is then 1, which bf16
    holds exactly."""
    if gate is None:
        return Sums(sums.m, sums.den + linear.den, sums.acc + linear.acc)
    else:
        return Sums(sums.m, sums.den * gate + linear.den, sums.acc * gate + linear.acc)


@triton.jit
def add_far_linear(p, at, sums, phi_q, c, weight_k):
    """sums with the tiles before c that hold keys weighed by features, read again."""
    near = window_start(p.window, c * p.chunk + p.chunk - 1)  # older keys are linear to some query
    for t in tl.range(first_tile(p, c), tl.minimum(c, tl.cdiv(near, p.chunk)), disable_licm=True):
        tokens = tokens_at(p, at, t * p.chunk, p.chunk)
        phi_k = key_features(p, at, tokens, load_k(p, at, tokens), weight_k)
        inside, outside = older_masks(p, c * p.chunk, (c - t) * p.chunk, p.window.far_linear)
        sums = add_linear(sums, phi_q, phi_k, outside, load_v(p, at, tokens), p.arithmetic)
    return sums


@triton.jit
def attention_forward(p, out, m_ptr, den_ptr, kv0, ksum0, kv1, ksum1, eps, NORMALIZE: tl.constexpr):
    """y; and of every query m (SPEC 3, in natural units) and den.

    kv0, ksum0: the state at the start of every segment, [N, H, segments, F, V] and [..., F].
    kv1, ksum1: where the state after the last token goes, [N, H, F, V] and [N, H, F].
    Either may be None. eps is added to den.
    """
    at = place_of(p)
    begin, end = chunk_range(p, at)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    factor = linear_factor(p, at)
    state = load_state(p, at, kv0, ksum0, at.index, False)
    gate = softmax_gate(p, at)
    causal = causal_pairs(p)
    carried = packed_keys_before(p, at, begin)

    for turn in tl.range(begin, end, disable_licm=True):
        c = chunk_of(at, turn)
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        i, start = tokens.position, c * p.chunk
        q = load_q(p, at, tokens)
        older = unpacked_tiles(p, carried, q.dtype)

        phi_q = query_features(p, at, tokens, q, weight_q, factor)
        linear = read_state(p, state, phi_q, empty_sums(p, LOWEST))
        for back in tl.static_range(1, p.window.carried + 1):
            old = tokens_at(p, at, start - back * p.chunk, p.chunk)
            tile = older[back - 1]
            if has_linear(p, back):
                phi_old = key_features(p, at, old, tile.k, weight_k)
                inside, outside = older_masks(p, start, back * p.chunk, True)
                linear = add_linear(linear, phi_q, phi_old, outside, tile.v, p.arithmetic)
                state = absorb_carried(p, at, state, c, back, old, tile, phi_old, weight_k)
            else:
                state = absorb_carried(p, at, state, c, back, old, tile, None, weight_k)
        if p.window.read_again:
            if p.window.far_linear:
                linear = add_far_linear(p, at, linear, phi_q, c, weight_k)
            state = absorb_tiles(p, at, state, first_tile(p, c), first_tile(p, c + 1), weight_k)
        sums = softmax_before(p, at, q, carried, i, c)

        k, v = load_k(p, at, tokens), load_v(p, at, tokens)
        inside, outside = own_masks(p, causal, start)
        if p.window.near_linear:
            phi_k = key_features(p, at, tokens, k, weight_k)
            linear = add_linear(linear, phi_q, phi_k, outside, v, p.arithmetic)
        if not has_older(p):
            state = absorb(p, state, tokens, phi_k, v)
        if p.window.size > 0:
            sums = add_softmax(sums, scores(p, q, k), inside, v, p.arithmetic)

        sums = gated_sum(gate, sums, linear)
        den, y = sums.den + eps, sums.acc
        if NORMALIZE:
            y *= (1.0 / den)[:, None]
        rows = rows_of(out, at.batch, at.head, tokens)
        store_tile(rows, y, tokens.valid, at.column, out.width, p.block_v)
        if at.part == 0:
            own = statistic(p, at, tokens)
            tl.store(den_ptr + own, den, mask=tokens.valid)
            if m_ptr is not None:
                m = tl.where(sums.m == LOWEST, 0.0, sums.m * LN2)
                tl.store(m_ptr + own, m, mask=tokens.valid)
        carried = carried_on(p, packed_keys(k, v), carried)

    if kv1 is not None:
        if at.segment == p.segments - 1:
            store_state(p, at, kv1, ksum1, at.n * p.heads + at.head, state, False)


@triton.jit
def segment_sums(p, kv, ksum):
    """What every segment adds to the state, [N, H, segments, F, V] and [..., F]; zeros for the last
    one, which nothing follows."""
    at = place_of(p)
    begin, end = chunk_range(p, at)
    end = tl.where(at.segment == p.segments - 1, begin, end)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    state = absorb_tiles(p, at, empty_state(p), first_tile(p, begin), first_tile(p, end), weight_k)
    store_state(p, at, kv, ksum, at.index, state, False)


@triton.jit
def in_order(before, total, before_next, total_next):
    """(what is before the last of a run, the run's sum), of two runs that follow each other. Not by
    a difference of sums: what comes later, an infinity even, does not touch what is before it."""
    return total + before_next, total + total_next


@triton.jit
def exclusive_sums_of(
    x, initial, size, count, block,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x [rows, count, size]: each of the count becomes the sum of those before it (after it, in
    REVERSE), in place, on top of ``initial`` [rows, size] or 0. A program takes a block of a row.

    TILE of the count at a time: what is loaded and stored in place one by one waits for memory
    every time.
    """
    row = tl.program_id(1).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        total = tl.load(initial + row * size + column, mask=inside, other=0.0)
    for first in tl.range(0, count, TILE, disable_licm=True):
        step = first + tl.arange(0, TILE)
        n = step
        if REVERSE:
            n = count - 1 - step
        cells = x + ((row * count + n) * size)[:, None] + column[None, :]
        mask = (step < count)[:, None] & inside[None, :]
        own = tl.load(cells, mask=mask, other=0.0)
        before, _ = tl.associative_scan((tl.zeros_like(own), own), 0, in_order)
        tl.store(cells, total[None, :] + before, mask=mask)
        total += tl.sum(own, 0)


@triton.jit
def exclusive_sums(
    kv, ksum, kv0, ksum0, size, width, count,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """kv [rows, count, size] and ksum [rows, count, width] in one launch: blocks of kv come
    first."""
    block, blocks = tl.program_id(0), tl.cdiv(size, BLOCK)
    if block < blocks:
        exclusive_sums_of(kv, kv0, size, count, block, REVERSE, BLOCK, TILE)
    else:
        exclusive_sums_of(ksum, ksum0, width, count, block - blocks, REVERSE, BLOCK, TILE)
