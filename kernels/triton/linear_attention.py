"""linear_attention and its gradient, with the schemas of torch.ops.lolcats_ops (SPEC 4)."""

from __future__ import annotations

from torch import Tensor

from . import attention
from .arguments import plan, rows
from .backward_pass import Incoming
from .launch import tiles_for


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    kv0: Tensor | None,
    ksum0: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    normalize: bool,
    eps: float,
    *codes: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, den, kv, ksum)."""
    problem = plan(
        q, k, v, weight_q, bias_q, weight_k, bias_k, None, cu_seqlens, key_padding_mask,
        scale=scale, codes=codes, tiles=tiles_for("forward", q, weight_k, v),
    )  # fmt: skip
    y = attention.forward(
        problem,
        q,
        v,
        kv0=attention.per_query_head(problem, kv0),
        ksum0=attention.per_query_head(problem, ksum0),
        with_state=True,
        eps=eps,
        normalize=normalize,
    )
    heads = k.shape[1] if weight_k is None else weight_k.shape[0]
    first = slice(None, None, problem.heads // heads)  # a group's heads have the same state
    return y.out, y.den, y.kv[:, first].contiguous(), y.ksum[:, first].contiguous()


def linear_attention_backward(
    do: Tensor,
    dkv: Tensor | None,
    dksum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    kv0: Tensor | None,
    ksum0: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding_mask: Tensor | None,
    out: Tensor,
    den: Tensor,
    scale: float,
    normalize: bool,
    eps: float,
    *codes: float,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dweight_q, dbias_q, dweight_k, dbias_k, dkv0, dksum0); absent ones are empty."""
    problem = plan(
        q, k, v, weight_q, bias_q, weight_k, bias_k, None, cu_seqlens, key_padding_mask,
        scale=scale, codes=codes, tiles=tiles_for("backward", q, weight_k, v),
    )  # fmt: skip
    incoming = Incoming(rows(do), None, None, None, None, None, 0.0)
    if normalize:
        incoming = Incoming(rows(do), rows(out), None, den, None, None, eps)
    gradients = attention.backward(
        problem, q, k, v, weight_q, bias_q, weight_k, bias_k, incoming,
        kv0=attention.per_query_head(problem, kv0), ksum0=attention.per_query_head(problem, ksum0),
        dkv=attention.of_first_head(problem, dkv), dksum=attention.of_first_head(problem, dksum),
    )  # fmt: skip
    inputs = gradients.dq, gradients.dk, gradients.dv
    states = (
        attention.group_sum(gradients.kv0, kv0, q),
        attention.group_sum(gradients.ksum0, ksum0, q),
    )
    return *inputs, *attention.map_gradients(gradients), *states
