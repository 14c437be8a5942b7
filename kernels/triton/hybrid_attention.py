"""hybrid_attention and its gradient, with the schemas of torch.ops.lolcats_ops (SPEC 3)."""

from __future__ import annotations

from torch import Tensor

from . import attention
from .arguments import plan, rows
from .backward_pass import Incoming
from .launch import tiles_for


def hybrid_attention(
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
    window: int,
    window_kind: int,
    sink: int,
    scale: float,
    affine: bool,
    *codes: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, m, den)."""
    problem = plan(
        q, k, v, weight_q, bias_q, weight_k, bias_k, gate, cu_seqlens, key_padding_mask,
        window=(window, window_kind, sink), scale=scale, affine=affine, codes=codes,
        tiles=tiles_for("forward", q, weight_k, v),
    )  # fmt: skip
    y = attention.forward(problem, q, v)
    return y.out, y.m, y.den


def hybrid_attention_backward(
    do: Tensor,
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
    out: Tensor,
    m: Tensor,
    den: Tensor,
    window: int,
    window_kind: int,
    sink: int,
    scale: float,
    affine: bool,
    *codes: float,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dweight_q, dbias_q, dweight_k, dbias_k, dgate); absent biases' are empty."""
    problem = plan(
        q, k, v, weight_q, bias_q, weight_k, bias_k, gate, cu_seqlens, key_padding_mask,
        window=(window, window_kind, sink), scale=scale, affine=affine, codes=codes,
        tiles=tiles_for("backward", q, weight_k, v),
    )  # fmt: skip
    incoming = Incoming(rows(do), rows(out), None, den, None, None, 0.0)
    maps = weight_q, bias_q, weight_k, bias_k
    gradients = attention.backward(problem, q, k, v, *maps, incoming)
    inputs = gradients.dq, gradients.dk, gradients.dv
    return (
        *inputs,
        *attention.map_gradients(gradients),
        attention.gate_gradient(problem, gradients, gate, affine),
    )
