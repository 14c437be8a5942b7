"""hybrid_attention_step_: a few or many new tokens on states in place, with the schema of
torch.ops.lolcats_ops (SPEC 5).

A program takes a sequence, a head of the state with all query heads that share it, block_v columns
of the values and a segment of the chunks of new tokens. Before a chunk, the keys that have left the
windows of all its queries are folded into the state; the others are weighed pair by pair, as in
forward.py, wherever they lie.

A few tokens are chunks of one. The state is then read once and written once, 8 F V bytes for every
head of the state, beside 2 w (D + V) bytes of 16-bit keys and values for every query head.
That is one launch; of many tokens of few states, the segments' states are summed up before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention, launch
from .arguments import Plan, constant, contiguous, empty_like_rows, plan, rows, sequence_count
from .features import load_weight, operand, project
from .forward import add_linear, add_softmax, empty_sums, linear_factor, log2_gate, scores
from .launch import next_power_of_2
from .past import (
    folded_before,
    is_last,
    keys_at,
    load_keys,
    load_values,
    past_of,
    remember,
    sinks_at,
    with_head,
)
from .problem import LOWEST, TERRACE, Arithmetic, Group, Pool, Sums
from .state import (
    add_rows,
    empty_state,
    features_at,
    load_state,
    read_state,
    store_ksum,
    store_kv,
    store_state,
)
from .tokens import chunk_range, load_tile, place_of, rows_of, store_tile, tokens_at
from .window import position_masks, sink_mask, window_start


@triton.jit
def fold(p, pool, group, at, new, past, state, begin, end, weight_k):
    """The state with the keys at [begin, end)."""
    for position in range(begin, end, group.folds):
        keys = keys_at(p, pool, new, past, position, group.folds)
        k, v = load_keys(p, keys), load_values(p, at, keys)
        keep = keys.valid & (keys.position < end)
        phi_k = features_at(p, at, k, keys.k, keys.valid, weight_k)
        v = tl.where(keep[:, None], v, 0.0)
        state = add_rows(p, state, phi_k, v, tl.where(keep, 1.0, 0.0))
    return state


@triton.jit
def softmax_sums(p, pool, group, at, new, past, q, i, log2_g, begin, end):
    """Sums over the sinks and the keys at [begin, end) that a chunk attends by softmax."""
    sums = empty_sums(p, LOWEST)
    if p.window.sink > 0:
        first = sinks_at(p, pool, new, past)
        s_first, v_first = scores(p, q, load_keys(p, first)), load_values(p, at, first)
        inside = sink_mask(p, at, i, first.position)
        sums = add_softmax(sums, s_first, inside, v_first, p.arithmetic)
    if p.window.size > 0:
        for position in range(begin, end, group.keys):
            keys = keys_at(p, pool, new, past, position, group.keys)
            s, v = scores(p, q, load_keys(p, keys)), load_values(p, at, keys)
            near, outside = position_masks(p, at, i, keys.position)
            sums = add_softmax(sums, s, near, v, p.arithmetic)
    g = tl.exp2(log2_g)
    return Sums(sums.m, sums.den * g, sums.acc * g)


@triton.jit
def add_linear_keys(p, pool, group, at, new, past, sums, phi_q, i, begin, end, weight_k):
    """sums with the keys at [begin, end) that a chunk weighs by features."""
    for position in range(begin, end, group.folds):
        keys = keys_at(p, pool, new, past, position, group.folds)
        k, v = load_keys(p, keys), load_values(p, at, keys)
        phi_k = features_at(p, at, k, keys.k, keys.valid, weight_k)
        inside, outside = position_masks(p, at, i, keys.position)
        sums = add_linear(sums, phi_q, phi_k, outside, v, p.arithmetic)
    return sums


@triton.jit
def attend(p, pool, group, at, new, past, state, out, c, head, folded, weight_q, weight_k):
    """y of chunk c for a query head. The state holds the keys before ``folded``."""
    asking = with_head(at, head, past.total)
    log2_g, factor = log2_gate(p, asking), linear_factor(p, asking)
    queries = tokens_at(p, new, c * p.chunk, p.chunk)
    i = past.length + queries.position
    rows = rows_of(p.q, at.batch, head, queries)
    q = load_tile(rows, queries.valid, 0, p.q.width, p.block_d)
    first = past.length + c * p.chunk
    end = tl.minimum(first + p.chunk, past.total)
    begin = tl.maximum(folded, window_start(p.window, first))
    sums = softmax_sums(p, pool, group, at, new, past, q, i, log2_g, begin, end)
    z = project(q, rows, queries.valid, weight_q, p.map_q, head, p.arithmetic)
    phi_q = operand(z, p.map_q, factor, p.arithmetic)
    sums = read_state(p, state, phi_q, sums)
    if p.chunk > 1 or pool.slack > 0:  # else all keys that left the only query's window are folded
        far = tl.minimum(window_start(p.window, end - 1), end)
        sums = add_linear_keys(p, pool, group, at, new, past, sums, phi_q, i, folded, far, weight_k)
    y = sums.acc * (1.0 / sums.den)[:, None]
    rows = rows_of(out, at.batch, head, queries)
    store_tile(rows, y, queries.valid, at.column, out.width, p.block_v)


@triton.jit
def query_weight(p, group, weight_q, head):
    """The weight of a query head: weight_q where the heads of the group share it."""
    if group.heads > p.map_q.group:
        return load_weight(p.map_q, head, p.arithmetic, p.block_d)
    else:
        return weight_q


@triton.jit
def attention_step(p, pool, group, out, kv0, ksum0, arrivals, VALUE_WIDTH: tl.constexpr):
    """y of the new tokens, and the pool brought up to date.

    kv0, ksum0: the state at the start of every segment, [N, Hs, segments, F, V] and [..., F], or
    None for one segment, which starts from the pool.
    arrivals: zeros [N, Hs + Hk + 1] int32, counters of the programs that share the ksum of a state
    head, the ring of a key/value head, and the length of a sequence.
    """
    new = place_of(p)
    past = past_of(p, pool, new)
    if not past.known:
        return
    at = with_head(new, new.head, past.total)
    begin, end = chunk_range(p, new)
    first_head = at.head * group.heads
    weight_q = load_weight(p.map_q, first_head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    slot = past.slot * p.heads + at.head
    if kv0 is None:
        state = load_state(p, at, pool.kv, pool.ksum, slot, False)
    else:
        state = load_state(p, at, kv0, ksum0, at.index, False)
    folded = tl.where(at.segment == 0, past.start, folded_before(p, past, begin))

    last = at.segment == p.segments - 1  # goes round once more, to fold what the call leaves folded
    for c in range(begin, end + last.to(tl.int32)):
        fold_to = tl.where(c < end, folded_before(p, past, c), past.end)
        state = fold(p, pool, group, at, new, past, state, folded, fold_to, weight_k)
        folded = fold_to
        if c < end:
            for g in range(group.heads):
                head = first_head + g
                weight = query_weight(p, group, weight_q, head)
                attend(p, pool, group, at, new, past, state, out, c, head, folded, weight, weight_k)

    if last:
        if past.end > past.start:
            store_kv(p, at, pool.kv, slot, state)
        if is_last(arrivals_of(p, new, arrivals) + at.head, p.slices):
            store_ksum(p, at, pool.ksum, slot, state, False)
    finish(p, pool, new, past, arrivals, VALUE_WIDTH)


@triton.jit
def arrivals_of(p, new, arrivals):
    """The counters of a sequence."""
    return arrivals + new.n * (p.heads + p.heads // p.group + 1)


@triton.jit
def finish(p, pool, new, past, arrivals, VALUE_WIDTH: tl.constexpr):
    """Overwrites keys, and then counts, once every program that reads the old ones has arrived."""
    counters = arrivals_of(p, new, arrivals) + p.heads
    if is_last(counters + new.head // p.group, p.group * p.segments * p.slices):
        remember(p, pool, new, past, VALUE_WIDTH)
        if is_last(counters + p.heads // p.group, p.heads // p.group):
            tl.store(pool.length + past.slot, past.total.to(tl.int64))
            tl.store(pool.folded + past.slot, past.folded.to(tl.int64))


@triton.jit
def step_segment_sums(p, pool, group, kv, ksum):
    """What every segment adds to the state, [N, Hs, segments, F, V] and [..., F]."""
    new = place_of(p)
    past = past_of(p, pool, new)
    if not past.known:
        return
    at = with_head(new, new.head, past.total)
    begin, end = chunk_range(p, new)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    start = tl.where(at.segment == 0, past.start, folded_before(p, past, begin))
    stop = folded_before(p, past, end)
    state = fold(p, pool, group, at, new, past, empty_state(p), start, stop, weight_k)
    store_state(p, at, kv, ksum, at.index, state, False)


DECODED = 8  # so many new tokens come one after another, each as if it were alone


def group_of(
    q: Tensor, state_heads: int, ring: int, slack: int, terrace: bool, width: int
) -> Group:
    """Tiles for the query heads that share a state."""
    if q.shape[2] > DECODED:
        keys = folds = 32 if width <= 128 and q.dtype == torch.bfloat16 else 16
    else:
        keys = min(next_power_of_2(ring + 1), 64)
        # One key leaves a sliding window at a time; terraces leave as a whole.
        folds = 16 if terrace or slack else 1
    return Group(*map(constant, (q.shape[1] // state_heads, keys, folds)))


def initial_states(
    problem: Plan, pool: Pool, group: Group, v: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The states at the start of every segment, or None where there is one."""
    if problem.segments == 1:
        return None, None
    slots = slice(None) if pool.slots is None else pool.slots.long().clamp(0, pool.kv.shape[0] - 1)
    initial = pool.kv[slots], pool.ksum[slots]
    return attention.segment_states(problem, v, step_segment_sums, (pool, group), initial)


def hybrid_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    weight_k: Tensor,
    bias_k: Tensor | None,
    gate: Tensor,
    kv: Tensor,
    ksum: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    k_sink: Tensor,
    v_sink: Tensor,
    length: Tensor,
    folded: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    window: int,
    window_kind: int,
    scale: float,
    affine: bool,
    *codes: float,
) -> Tensor:
    """out. What is launched depends on shapes alone, so that a CUDA graph can replay it."""
    padded = cu_seqlens is not None or key_padding_mask is not None
    out = empty_like_rows(q, v.shape[3], zero=padded)
    if q.numel() == 0:
        return out
    state_heads, kv_heads = kv.shape[1], k.shape[1]
    ring, sink = k_ring.shape[2], k_sink.shape[2]
    terrace = window_kind == TERRACE.value
    slack = ring - window * (2 if terrace else 1)
    width = max(q.shape[3], weight_q.shape[2], weight_k.shape[2])
    sequences = sequence_count(q, cu_seqlens)
    decoded = q.shape[2] <= DECODED
    problem = plan(
        q, k, v, weight_q, bias_q, weight_k, bias_k, gate, cu_seqlens, key_padding_mask,
        window=(window, window_kind, sink), scale=scale, affine=affine, codes=codes,
        tiles=launch.step_tiles(q, weight_k, v, sequences * state_heads, decoded),
        state_heads=state_heads,
    )  # fmt: skip
    if decoded:
        exact = Arithmetic(constant(tl.float32), constant(launch.precision(q.dtype)))
        problem = replace(problem, problem=problem.problem._replace(arithmetic=exact))
    stores = [rows(x) if x.shape[2] else None for x in (k_ring, v_ring, k_sink, v_sink)]
    sums = {"kv": kv, "ksum": ksum, "length": length, "folded": folded}
    kv, ksum, length, folded = (contiguous(f"state.{name}", x) for name, x in sums.items())
    slots = None if state_indices is None else state_indices.contiguous()
    size = float(length.shape[0])
    pool = Pool(kv, ksum, *stores, length, folded, slots, size, constant(ring), constant(slack))
    group = group_of(q, state_heads, ring, slack, terrace, width)
    counters = sequences, state_heads + kv_heads + 1
    arrivals = torch.zeros(counters, dtype=torch.int32, device=q.device)
    states = initial_states(problem, pool, group, v)
    value_width = next_power_of_2(v.shape[3])
    problem.run(attention_step, pool, group, rows(out), *states, arrivals, value_width)
    return out
