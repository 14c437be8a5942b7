"""Launches of the attention kernels: what linear, hybrid attention and transfer have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .arguments import Plan, empty_like_rows, rows
from .backward_of_keys import backward_keys, segment_gradients
from .backward_of_queries import backward_queries
from .backward_pass import Incoming, Parts, RowGradients
from .forward import attention_forward, exclusive_sums, segment_sums

# Words of a state that a program of exclusive_sums adds up, and segments that it loads at once: 32
# numbers of a thread.
BLOCK, TILE = 256, 16


def fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def state_shape(plan: Plan, v: Tensor) -> tuple[int, int]:
    """F, V."""
    f = plan.problem.map_k
    return f.width.value * (2 if f.two_sided.value else 1), v.shape[3]


State = tuple[Tensor | None, Tensor | None]  # kv, ksum


def segment_states(
    plan: Plan,
    v: Tensor,
    kernel: Any,
    args: tuple,
    initial: State,
    *,
    reverse: bool = False,
    by_slice: bool = False,
) -> State:
    """What precedes (in reverse follows) every segment, on top of ``initial``: [N, H, segments, F,
    V] and [N, H, segments, (slices,) F]. ``kernel`` finds what each segment adds."""
    shape = plan.sequences, plan.heads, plan.segments
    width, value_dim = state_shape(plan, v)
    kv = fp32(v, *shape, width, value_dim)
    ksum = fp32(v, *shape, *((plan.slices,) if by_slice else ()), width)
    plan.run(kernel, *args, kv, ksum)
    size, row = width * value_dim, ksum.stride(2)
    grid = (-(-size // BLOCK) + -(-row // BLOCK), plan.sequences * plan.heads)
    sums = kv, ksum, *initial, size, row, plan.segments
    launch.launch(exclusive_sums, grid, *sums, reverse, BLOCK, TILE)
    return kv, ksum


def initial_states(plan: Plan, v: Tensor, kv0: Tensor | None, ksum0: Tensor | None) -> State:
    """The states at the start of every segment, [N, H, segments, F, V] and [N, H, segments, F]."""
    if plan.segments == 1:
        return kv0, ksum0
    return segment_states(plan, v, segment_sums, (), (kv0, ksum0))


def per_query_head(plan: Plan, x: Tensor | None) -> Tensor | None:
    """A state [N, Hs, ...] with the shared ones repeated for their group: [N, H, ...]."""
    if x is None or x.shape[1] == plan.heads:
        return None if x is None else x.contiguous()
    return x.repeat_interleave(plan.heads // x.shape[1], 1)


def of_first_head(plan: Plan, x: Tensor | None) -> Tensor | None:
    """A gradient [N, Hs, ...] of shared states as that of the first query head of each group."""
    if x is None or x.shape[1] == plan.heads:
        return None if x is None else x.contiguous()
    y = x.new_zeros(x.shape[0], plan.heads, *x.shape[2:])
    y[:, :: plan.heads // x.shape[1]] = x
    return y


def group_sum(x: Tensor | None, initial: Tensor | None, like: Tensor) -> Tensor:
    """The gradient [N, Hs, ...] of an initial state from those of the query heads; else empty."""
    if x is None or initial is None:
        return fp32(like, 0)
    return x.unflatten(1, (initial.shape[1], -1)).sum(2)


class Output(NamedTuple):
    """Of a forward pass."""

    out: Tensor  # [B, H, T, V]
    m: Tensor | None  # [B, H, T]
    den: Tensor
    kv: Tensor | None  # [N, H, F, V]
    ksum: Tensor | None


def forward(
    plan: Plan,
    q: Tensor,
    v: Tensor,
    *,
    kv0: Tensor | None = None,
    ksum0: Tensor | None = None,
    with_state: bool = False,
    eps: float = 0.0,
    normalize: bool = True,
    out: Tensor | None = None,
) -> Output:
    """y, into ``out`` if it is given; padded tokens get m = 0, den = 1 and, in a new y, 0."""
    if out is None:
        out = empty_like_rows(q, v.shape[3], zero=plan.padded)

    def statistic(of_padding: float) -> Tensor:
        if plan.padded:
            return q.new_full(q.shape[:3], of_padding, dtype=torch.float32)
        return fp32(q, *q.shape[:3])

    m = None if plan.problem.gate is None else statistic(0.0)
    den = statistic(1.0)
    width, value_dim = state_shape(plan, v)
    kv1, ksum1 = None, None
    if with_state:
        kv1 = fp32(q, plan.sequences, plan.heads, width, value_dim)
        ksum1 = fp32(q, plan.sequences, plan.heads, width)
    states = initial_states(plan, v, kv0, ksum0)
    plan.run(attention_forward, rows(out), m, den, *states, kv1, ksum1, eps, normalize)
    return Output(out, m, den, kv1, ksum1)


class Gradients(NamedTuple):
    """Of a backward pass; those of inputs are None where they were not asked for."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    weight_q: Tensor | None
    bias_q: Tensor | None
    weight_k: Tensor | None
    bias_k: Tensor | None
    dm: Tensor  # [H], sums over the queries
    kv0: Tensor | None
    ksum0: Tensor | None


def parts_of(x: Tensor) -> Parts:
    """x [parts, B, H, T, width]."""
    return Parts(rows(x[0])._replace(pointer=x), x.stride(0))


def partial(x: Tensor, count: int, zero: bool) -> Tensor:
    """Room for the gradient of x in ``count`` parts: of x's dtype if it is one, else fp32."""
    dtype = x.dtype if count == 1 else torch.float32
    y = empty_like_rows(x, x.shape[3], dtype=dtype, batch=count * x.shape[0], zero=zero)
    return y.unflatten(0, (count, x.shape[0]))


def total(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the parts, in the memory order of each."""
    return x[0] if x.shape[0] == 1 else torch.sum(x, 0, out=torch.empty_like(x[0])).to(dtype)


def shares(plan: Plan, parameter: Tensor | None, resident: bool = True) -> Tensor | None:
    """Room for every program's share of a gradient; zero where the programs add it up in memory."""
    if parameter is None:
        return None
    y = fp32(parameter, plan.programs, *parameter.shape[1:])
    return y if resident else y.zero_()


def of_programs(plan: Plan, x: Tensor) -> Tensor:
    """Sums of what every program left, [programs, ...], by head: [H, ...]."""
    each = plan.segments * plan.slices
    return x.unflatten(0, (plan.sequences, plan.heads, each)).sum((0, 2))


def of_maps(plan: Plan, x: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """The gradient of a map's parameter [Hf, ...], from the shares of the programs."""
    if x is None or parameter is None:
        return None
    return of_programs(plan, x).unflatten(0, (parameter.shape[0], -1)).sum(1)


def backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    incoming: Incoming,
    *,
    with_inputs: bool = True,
    kv0: Tensor | None = None,
    ksum0: Tensor | None = None,
    dkv: Tensor | None = None,
    dksum: Tensor | None = None,
) -> Gradients:
    """Gradients for what comes in, with initial states and the gradients of final ones."""
    p = plan.problem
    batch, heads, length, head_dim = q.shape
    statistics = batch * heads * length
    left = RowGradients(
        fp32(q, plan.slices, statistics), fp32(q, statistics), fp32(q, plan.slices, statistics),
        statistics,
    )  # fmt: skip
    d_weight_q = shares(plan, weight_q, p.map_q.resident.value)
    d_weight_k = shares(plan, weight_k, p.map_k.resident.value)
    d_bias_q, d_bias_k = shares(plan, bias_q), shares(plan, bias_k)
    dm = fp32(q, plan.programs)
    dq = dk = dv = dk_sink = dv_sink = None
    groups = heads // k.shape[1]
    if with_inputs:
        dq = partial(q, plan.slices, plan.padded)
        dk = partial(k, plan.slices * groups, plan.padded)
        dv = partial(v, groups, plan.padded)
        if p.window.sink.value:
            block = p.window.sink_block.value
            dk_sink = fp32(q, plan.programs, block, p.block_d.value)
            dv_sink = fp32(q, plan.programs, block, p.block_v.value)
    plan.run(
        backward_queries, incoming, left, *initial_states(plan, v, kv0, ksum0),
        None if dq is None else parts_of(dq), d_weight_q, d_bias_q, dm, dk_sink, dv_sink,
    )  # fmt: skip

    dkv0 = dksum0 = None
    if kv0 is not None and ksum0 is not None:
        dkv0 = torch.empty_like(kv0)
        dksum0 = fp32(q, *ksum0.shape[:2], plan.slices, ksum0.shape[2])
    plan.run(
        backward_keys, incoming, left, *final_gradients(plan, v, incoming, left, dkv, dksum),
        None if dk is None else parts_of(dk), None if dv is None else parts_of(dv), d_weight_k,
        d_bias_k, dkv0, dksum0, dk_sink, dv_sink,
    )  # fmt: skip
    return Gradients(
        None if dq is None else total(dq, q.dtype),
        None if dk is None else total(dk, k.dtype),
        None if dv is None else total(dv, v.dtype),
        of_maps(plan, d_weight_q, weight_q),
        of_maps(plan, d_bias_q, bias_q),
        of_maps(plan, d_weight_k, weight_k),
        of_maps(plan, d_bias_k, bias_k),
        of_programs(plan, dm),
        dkv0,
        None if dksum0 is None else dksum0.sum(2),
    )


def final_gradients(
    plan: Plan,
    v: Tensor,
    incoming: Incoming,
    left: RowGradients,
    dkv: Tensor | None,
    dksum: Tensor | None,
) -> State:
    """The state's gradient at the end of every segment, [N, H, segments, F, V] and [N, H, segments,
    slices, F]: the slices' shares of ksum's, that of what follows being the first's."""
    if dksum is not None:
        dksum = torch.nn.functional.pad(dksum.unsqueeze(2), (0, 0, 0, plan.slices - 1))
    if plan.segments == 1:
        return dkv, dksum
    follows = (dkv, dksum)
    return segment_states(
        plan, v, segment_gradients, (incoming, left), follows, reverse=True, by_slice=True
    )


def map_gradients(gradients: Gradients) -> tuple[Tensor, ...]:
    """(dweight_q, dbias_q, dweight_k, dbias_k), those of absent parameters empty."""
    return tuple(gradients.dm.new_empty(0) if x is None else x for x in gradients[3:7])


def gate_gradient(plan: Plan, gradients: Gradients, gate: Tensor, affine: bool) -> Tensor:
    """The gate scales the softmax part, whose weights' gradients sum up to -dm, and with ``affine``
    the linear part, whose sum up to dm. Without windows there is no softmax part, and weights that
    all have one factor do not depend on it: what is left of dm is rounding."""
    window = plan.problem.window
    if window.size.value == window.sink.value == 0:
        return torch.zeros_like(gate)
    return -gradients.dm if affine else -gradients.dm * gate.sigmoid().neg().add(1)
