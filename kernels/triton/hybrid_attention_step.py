"""hybrid_attention_step_: a few or many new tokens on states in place, with the schema of
torch.ops.lolcats_ops (SPEC 5).

A program takes a sequence, a head of the state with all query heads that share it, block_v columns
of the values and a segment of the chunks of new tokens. Before a chunk, the keys that have left the
windows of all its queries are folded into the state; the others are weighed pair by pair, as in
forward.py, wherever they lie.

One or a few tokens are one chunk: the state is read once and written once, 8 F V bytes for every
head of the state, beside 2 w (D + V) bytes of 16-bit keys and values. Everything is one launch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention, launch
from .arguments import Plan, constant, empty_like_rows, next_power_of_2, plan, rows
from .features import load_weight, project
from .forward import add_linear, add_softmax, linear_factor, log2_gate, scores
from .past import (
    folded_before,
    is_last,
    keys_at,
    load_keys,
    load_values,
    past_of,
    place_in,
    remember,
    sinks_at,
)
from .problem import TERRACE, Arithmetic, Group, Place, Pool, Sums
from .state import (
    absorb,
    empty_state,
    features_to_keep,
    load_state,
    read_projected,
    store_ksum,
    store_kv,
    store_state,
)
from .tokens import chunk_range, load_tile, place_of, rows_of, store_tile, tokens_from
from .window import pair_masks, sink_mask, window_start

# Below any score: the maximum over no keys. Not -inf, since a query's first tile may hold no key
# that it attends by softmax, and exp(-inf + inf) is not 1.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def fold(p, pool, group, at, new, past, state, begin, end, weight_k):
    """The state with the keys at [begin, end)."""
    for position in range(begin, end, group.folds):
        keys = keys_at(p, pool, new, past, position, group.folds)
        k, v = load_keys(p, keys), load_values(p, at, keys)
        keep = keys.valid & (keys.position < end)
        phi_k = features_to_keep(p, at, k, keys.k, keys.valid, keep, weight_k)
        state = absorb(state, phi_k, v, p.arithmetic)
    return state


@triton.jit
def project_group(p, group, at, queries, q, q_rows, weight_q):
    """x W of the rows of a tile, whose heads may have maps of their own."""
    first = at.head * group.heads
    if group.heads == 1 or p.map_q.group > 1:
        return project(q, q_rows, queries.valid, weight_q, p.map_q, first, p.arithmetic)
    else:
        lane = tl.arange(0, group.rows) % group.lanes
        z = tl.zeros((group.rows, p.map_q.block), tl.float32)
        for g in range(group.heads):
            weight = load_weight(p.map_q, first + g, p.arithmetic, p.block_d)
            own = project(q, q_rows, queries.valid, weight, p.map_q, first + g, p.arithmetic)
            z = tl.where((lane == g)[:, None], own, z)
        return z


@triton.jit
def softmax_sums(p, pool, group, at, new, past, q, i, log2_g, begin, end):
    """Sums over the keys that a tile of queries attends by softmax: sinks and some of [begin, end)."""
    sums = Sums(
        tl.full((group.rows,), LOWEST, tl.float32),
        tl.zeros((group.rows,), tl.float32),
        tl.zeros((group.rows, p.block_v), tl.float32),
    )
    if p.window.sink > 0:
        keys = sinks_at(p, pool, new, past)
        s, v = scores(p, q, load_keys(p, keys)), load_values(p, at, keys)
        inside = sink_mask(p, at, i, keys.position)
        sums = add_softmax(sums, s, inside, log2_g, v, p.arithmetic)
    if p.window.size > 0:
        for position in range(begin, end, group.keys):
            keys = keys_at(p, pool, new, past, position, group.keys)
            s, v = scores(p, q, load_keys(p, keys)), load_values(p, at, keys)
            inside, outside = pair_masks(p, at, i, keys.position)
            sums = add_softmax(sums, s, inside, log2_g, v, p.arithmetic)
    return sums


@triton.jit
def add_linear_keys(p, pool, group, at, new, past, sums, phi_q, i, begin, end, weight_k):
    """sums with the keys at [begin, end) that queries weigh by features."""
    for position in range(begin, end, group.keys):
        keys = keys_at(p, pool, new, past, position, group.keys)
        k, v = load_keys(p, keys), load_values(p, at, keys)
        phi_k = features_to_keep(p, at, k, keys.k, keys.valid, keys.valid, weight_k)
        inside, outside = pair_masks(p, at, i, keys.position)
        sums = add_linear(sums, phi_q, phi_k.phi, outside, v, p.arithmetic)
    return sums


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
    at = place_in(new, past)
    begin, end = chunk_range(p, new)
    lane = tl.arange(0, group.rows) % group.lanes
    heads = at.head * group.heads + tl.minimum(lane, group.heads - 1)
    asking = Place(
        at.n, at.batch, at.first, at.length, heads, at.part, at.column, at.segment, at.slot
    )
    log2_g, factor = log2_gate(p, asking), linear_factor(p, asking)
    if factor is not None:
        factor = factor[:, None]
    weight_q = load_weight(p.map_q, at.head * group.heads, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    pool_slot = past.slot * p.heads + at.head
    if kv0 is None:
        state = load_state(p, at, pool.kv, pool.ksum, pool_slot)
    else:
        state = load_state(p, at, kv0, ksum0, at.slot)
    folded = tl.where(at.segment == 0, past.start, folded_before(p, past, begin))

    for c in range(begin, end):
        fold_to = folded_before(p, past, c)
        state = fold(p, pool, group, at, new, past, state, folded, fold_to, weight_k)
        folded = fold_to
        queries = tokens_from(p, new, c * p.chunk, tl.arange(0, group.rows) // group.lanes)
        i = past.length + queries.position
        stop = tl.minimum(past.length + (c + 1) * p.chunk, past.total)  # behind the last query
        q_rows = rows_of(p.q, at.batch, heads, queries)
        q = load_tile(q_rows, queries.valid, 0, p.q.width, p.block_d)
        near = tl.maximum(folded, window_start(p.window, past.length + c * p.chunk))
        sums = softmax_sums(p, pool, group, at, new, past, q, i, log2_g, near, stop)
        z = project_group(p, group, at, queries, q, q_rows, weight_q)
        read = read_projected(p, state, z, factor, sums.den, sums.acc)
        sums = Sums(sums.m, read.den, read.acc)
        far = tl.minimum(window_start(p.window, stop - 1), stop)
        sums = add_linear_keys(
            p, pool, group, at, new, past, sums, read.phi, i, folded, far, weight_k
        )
        rows = rows_of(out, at.batch, heads, queries)
        real = queries.valid & (lane < group.heads)
        y = sums.acc * (1.0 / sums.den)[:, None]
        store_tile(rows, y, real, at.column, out.width, p.block_v)

    if at.segment == p.segments - 1:
        state = fold(p, pool, group, at, new, past, state, folded, past.end, weight_k)
        if past.end > past.start:
            store_kv(p, at, pool.kv, pool_slot, state)
        row = arrivals + at.n * (p.heads + p.heads // p.group + 1)
        if is_last(row + at.head, p.slices):
            store_ksum(p, at, pool.ksum, pool_slot, state)
    finish(p, pool, new, past, arrivals, VALUE_WIDTH)


@triton.jit
def finish(p, pool, new, past, arrivals, VALUE_WIDTH: tl.constexpr):
    """Overwrites keys, and then counts, once every program that reads the old ones has arrived."""
    kv_heads: tl.constexpr = p.heads // p.group
    row = arrivals + new.n * (p.heads + kv_heads + 1) + p.heads
    if is_last(row + new.head // p.group, p.group * p.segments * p.slices):
        remember(p, pool, new, past, VALUE_WIDTH)
        if is_last(row + kv_heads, kv_heads):
            tl.store(pool.length + past.slot, past.total)
            tl.store(pool.folded + past.slot, past.folded)


@triton.jit
def step_segment_sums(p, pool, group, kv, ksum):
    """What every segment adds to the state, [N, Hs, segments, F, V] and [..., F]."""
    new = place_of(p)
    past = past_of(p, pool, new)
    at = place_in(new, past)
    begin, end = chunk_range(p, new)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    start = tl.where(at.segment == 0, past.start, folded_before(p, past, begin))
    stop = folded_before(p, past, end)
    state = fold(p, pool, group, at, new, past, empty_state(p), start, stop, weight_k)
    store_state(p, at, kv, ksum, at.slot, state)


DECODED = 8  # so many tokens are computed with fp32's precision, in one chunk


def group_of(query_heads: int, length: int, ring: int, width: int) -> tuple[Group, int]:
    """Tiles for query heads that share a state, and the tokens of a chunk."""
    lanes = next_power_of_2(query_heads, 1)
    if length <= DECODED:
        rows = max(16, lanes * next_power_of_2(length, 1))
        keys = min(next_power_of_2(ring + length), 64)
        folds = 16
    else:
        rows = max(64 if width <= 128 else 32, lanes)
        keys = folds = 32 if width <= 128 else 16
    sizes = query_heads, lanes, rows, keys, folds
    return Group(*map(constant, sizes)), rows // lanes


def initial_states(
    problem: Plan, pool: Pool, group: Group, v: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The states at the start of every segment, or None where there is one."""
    if problem.segments == 1:
        return None, None
    width, value_dim = attention.state_shape(problem, v)
    shape = problem.sequences, problem.heads, problem.segments
    kv, ksum = attention.fp32(v, *shape, width, value_dim), attention.fp32(v, *shape, width)
    problem.run(step_segment_sums, pool, group, kv, ksum)
    slots = slice(None) if pool.slots is None else pool.slots.long()
    attention.scan(problem, kv, ksum, pool.kv[slots], pool.ksum[slots], False)
    return kv, ksum


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
    widths = q.shape[3], weight_q.shape[2], weight_k.shape[2]
    group, chunk = group_of(q.shape[1] // state_heads, q.shape[2], ring, max(widths))
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = launch.step_tiles(q, weight_k, v, chunk, sequences * state_heads)
    problem = plan(
        q, k, v, weight_q, bias_q, weight_k, bias_k, gate, cu_seqlens, key_padding_mask,
        window=(window, window_kind, sink), scale=scale, affine=affine, codes=codes, tiles=tiles,
        state_heads=state_heads,
    )  # fmt: skip
    if q.shape[2] <= DECODED:
        exact = Arithmetic(constant(tl.float32), constant(launch.precision()))
        problem = replace(problem, problem=problem.problem._replace(arithmetic=exact))
    stores = [rows(x) if x.shape[2] else None for x in (k_ring, v_ring, k_sink, v_sink)]
    slack = ring - window * (2 if window_kind == TERRACE.value else 1)
    pool = Pool(kv, ksum, *stores, length, folded, state_indices, constant(ring), constant(slack))
    counters = problem.sequences, state_heads + kv_heads + 1
    arrivals = torch.zeros(counters, dtype=torch.int32, device=q.device)
    states = initial_states(problem, pool, group, v)
    width = next_power_of_2(v.shape[3])
    problem.run(attention_step, pool, group, rows(out), *states, arrivals, width)
    return out
