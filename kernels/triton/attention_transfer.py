"""attention_transfer and its gradient, with the schemas of torch.ops.lolcats_ops (SPEC 7).

The student is ``attention.forward``. One more pass, quadratic and so parallel over the queries,
compares it with the teacher, softmax attention over all tiles of keys; the gradient of mse is that
of hybrid attention for dy = y - y*. cross_entropy.py has the gradient of the cross-entropy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention, launch
from .arguments import Plan, arithmetic_of, constant, empty_like_rows, plan, rows
from .backward_pass import Incoming
from .cross_entropy import (
    LEAST,
    LOG2_LEAST,
    entropy_gradients,
    load_student,
    masked_tile,
    tiles_of_keys,
)
from .features import load_weight
from .forward import add_step, empty_sums, feature_products, scores, softmax_step
from .launch import tiles_for
from .problem import INF, LN2, Arithmetic
from .state import key_features
from .tokens import (
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
from .window import linear_mask


@triton.jit
def compare_tile(
    p, at, values, i, q, student, weight_k, sums, cross, t, MASKED: tl.constexpr, TILE: tl.constexpr
):
    """The teacher's sums, and sum_j a*_ij log2 max(a_ij, LEAST) under the same maximum."""
    keys = tokens_at(p, at, t * TILE, TILE)
    k, v = load_k(p, at, keys), load_v(p, at, keys)
    s = scores(p, q, k)
    if MASKED:
        s = tl.where(i[:, None] >= keys.position[None, :], s, -INF)
    step = softmax_step(sums.m, s)
    if student is not None:
        phi_k = key_features(p, at, keys, k, weight_k)
        a = feature_products(student.phi, phi_k, p.arithmetic)
        if MASKED:  # as den sums the pairs near a chunk
            a = a.to(p.arithmetic.dtype).to(tl.float32)
        a *= student.inverse[:, None]
        log2_a = tl.log2(tl.maximum(a, LEAST))
        if MASKED:
            near = tl.maximum(s - student.offset[:, None], LOG2_LEAST)
            log2_a = tl.where(linear_mask(p, student.start, keys.position), log2_a, near)
        cross = cross * step.rescale + tl.sum(step.weights * log2_a, 1)
    return add_step(sums, step, v, values), cross


@triton.jit
def compare(
    p, values, residual, teacher, m_ptr, den_ptr, lse, delta, stride, squares, entropy,
    TILE: tl.constexpr,
):  # fmt: skip
    """The teacher y*, and how far the student is from it.

    residual: Rows that hold y and get y - y*. delta: [slices, B, H, T] with ``stride`` between
    slices, the sum of residual * y. squares, entropy: a program's sums of residual^2 and, unless
    it is None, of a* log a. values: the Arithmetic of the teacher's weights times values.
    """
    at = place_of(p)
    program = tl.program_id(0)
    weight_q, weight_k = None, None
    if entropy is not None:
        weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
        weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    total_square = tl.zeros((p.chunk,), tl.float32)
    total_cross = tl.zeros((p.chunk,), tl.float32)
    chunks = tl.cdiv(at.length, p.chunk)
    for turn in range(at.segment, chunks, p.segments):
        c = chunks - 1 - turn
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        i, q = tokens.position, load_q(p, at, tokens)
        student = None
        if entropy is not None:
            student = load_student(p, at, tokens, q, weight_q, m_ptr, den_ptr)
        sums = empty_sums(p, -INF)
        cross = tl.zeros((p.chunk,), tl.float32)
        tiles = tiles_of_keys(p, at, c, entropy is not None, TILE)
        for t in range(tiles.lead, tiles.far):
            sums, cross = compare_tile(
                p, at, values, i, q, student, weight_k, sums, cross, t, False, TILE
            )
        for n in range(tiles.count):
            t = masked_tile(tiles, n)
            sums, cross = compare_tile(
                p, at, values, i, q, student, weight_k, sums, cross, t, True, TILE
            )

        inverse = 1.0 / sums.den
        target = sums.acc * inverse[:, None]
        target_rows = rows_of(teacher, at.batch, at.head, tokens)
        store_tile(target_rows, target, tokens.valid, at.column, teacher.width, p.block_v)
        own_rows = rows_of(residual, at.batch, at.head, tokens)
        y = load_tile(own_rows, tokens.valid, at.column, residual.width, p.block_v)
        apart = tl.where(tokens.valid[:, None], y - target, 0.0)
        store_tile(own_rows, apart, tokens.valid, at.column, residual.width, p.block_v)
        own = statistic(p, at, tokens)
        part = own + at.part.to(tl.int64) * stride
        tl.store(delta + part, tl.sum(apart * y, 1), mask=tokens.valid)
        total_square += tl.sum(apart * apart, 1)
        total_cross += tl.where(tokens.valid, cross * inverse, 0.0)
        if at.part == 0:
            tl.store(lse + own, (sums.m + tl.log2(sums.den)) * LN2, mask=tokens.valid)
    tl.store(squares + program, tl.sum(total_square, 0))
    if entropy is not None:
        tl.store(entropy + program, tl.sum(total_cross, 0) * LN2)


def values_arithmetic(dtype: torch.dtype) -> Arithmetic:
    """Of the teacher's weights times values. Weights are at most 1, so fp16 holds them."""
    if dtype == torch.float16:
        return Arithmetic(constant(tl.float16), constant(launch.precision(torch.bfloat16)))
    return arithmetic_of(dtype)


def plans(
    first: str, quadratic: str, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None,
    key_padding_mask: Tensor | None, **settings: Any,
) -> tuple[Plan, Plan]:  # fmt: skip
    """The plan of a hybrid attention kernel, and of a quadratic one on the same sequences, whose
    segments are the shares of its programs."""
    weight_k = tensors[2]
    one = plan(
        q, k, v, *tensors, key_padding_mask, **settings, tiles=tiles_for(first, q, weight_k, v)
    )
    tiles = tiles_for(quadratic, q, weight_k, v)
    two = plan(q, k, v, *tensors, None, **settings, tiles=tiles)
    chunks = -(-q.shape[2] // tiles.chunk)
    programs = two.sequences * two.heads * two.slices
    segments = launch.segment_count(
        quadratic, chunks, programs, one.problem.sequences.bounds is not None
    )
    problem = two.problem._replace(sequences=one.problem.sequences, segments=segments)
    return one, replace(two, problem=problem, segments=segments)


def real_queries(q: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor | int:
    """H * real tokens, at least 1; nothing waits for the device."""
    batch, heads, length, _ = q.shape
    if cu_seqlens is not None:
        return (cu_seqlens[-1].long() * heads).clamp(min=1)
    if mask is not None:
        return (mask.sum() * heads).clamp(min=1)
    return max(batch * heads * length, 1)


def attention_transfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    weight_k: Tensor,
    bias_k: Tensor | None,
    gate: Tensor,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    with_xent: bool,
    window: int,
    window_kind: int,
    sink: int,
    scale: float,
    affine: bool,
    *codes: float,
) -> tuple[Tensor, ...]:
    """(teacher, mse, xent, residual, delta, m, den, lse); the residual is y - y*, delta its product
    with y, summed over V."""
    student, pairs = plans(
        "forward", "teacher_entropy" if with_xent else "teacher",
        q, k, v, weight_q, bias_q, weight_k, bias_k, gate, cu_seqlens,
        key_padding_mask=key_padding_mask, window=(window, window_kind, sink), scale=scale,
        affine=affine, codes=codes,
    )  # fmt: skip
    new = torch.zeros if student.padded else torch.empty
    shape = q.shape[:3]
    residual = new(*shape, v.shape[3], dtype=torch.float32, device=q.device)
    y = attention.forward(student, q, v, out=residual)
    teacher = empty_like_rows(q, v.shape[3], zero=student.padded)
    lse = new(shape, dtype=torch.float32, device=q.device)
    delta = new(pairs.slices, *shape, dtype=torch.float32, device=q.device)
    squares = attention.fp32(q, pairs.programs)
    entropy = attention.fp32(q, pairs.programs) if with_xent else None
    pairs.run(
        compare, values_arithmetic(q.dtype), rows(residual), rows(teacher), y.m, y.den, lse, delta,
        lse.numel(), squares, entropy, pairs.tiles.other,
    )  # fmt: skip
    queries = real_queries(q, cu_seqlens, key_padding_mask)
    mse = squares.sum() / (queries * v.shape[3])
    xent = torch.zeros_like(mse)
    if entropy is not None:  # every slice of V found the same
        xent = entropy.sum() / (queries * -pairs.slices)
    return teacher, mse, xent, residual, attention.total(delta, delta.dtype), y.m, y.den, lse


def attention_transfer_backward(
    d_mse: Tensor,
    d_xent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    bias_q: Tensor | None,
    weight_k: Tensor,
    bias_k: Tensor | None,
    gate: Tensor,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    residual: Tensor,
    delta: Tensor,
    m: Tensor,
    den: Tensor,
    lse: Tensor,
    with_xent: bool,
    window: int,
    window_kind: int,
    sink: int,
    scale: float,
    affine: bool,
    *codes: float,
) -> tuple[Tensor, ...]:
    """(dweight_q, dbias_q, dweight_k, dbias_k, dgate); absent biases' are empty."""
    maps = weight_q, bias_q, weight_k, bias_k
    student, pairs = plans(
        "backward", "entropy", q, k, v, *maps, gate, cu_seqlens,
        key_padding_mask=key_padding_mask, window=(window, window_kind, sink), scale=scale,
        affine=affine, codes=codes,
    )  # fmt: skip
    queries = real_queries(q, cu_seqlens, key_padding_mask)
    constants = torch.empty_like(lse) if with_xent else None
    incoming = Incoming(
        rows(residual), None, delta, den, d_mse * 2 / (queries * v.shape[3]), constants, 0.0
    )
    entropy = None
    if constants is not None:
        entropy = entropy_gradients(pairs, *maps, d_xent / queries, m, den, lse, constants)
    gradients = attention.backward(student, q, k, v, *maps, incoming, with_inputs=False)
    if entropy is not None:
        gradients = gradients._replace(
            **{
                name: x if x is None else x + getattr(gradients, name)
                for name, x in entropy.items()
            }
        )
    return (
        *attention.map_gradients(gradients),
        attention.gate_gradient(student, gradients, gate, affine),
    )
