"""Softmax attention and how far hybrid attention is from it, in one pass (SPEC 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from ..features import Features
from ..reference import Transfer
from .arguments import (
    attention_tensors,
    contiguous,
    empty_parameters,
    empty_rows,
    present,
    scale_or_default,
    window_code,
)
from .registration import autocast, differentiable, register_autocast, register_fake, register_vmap
from .validation import check_attention, check_flags, check_gate, check_window


def attention_transfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    sink: int = 0,
    scale: float | None = None,
    affine: bool = False,
    xent: bool = False,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Transfer:
    """Teacher y* = causal softmax attention, student y = hybrid_attention, and their distance:

        mse = mean (y - y*)^2, xent = -mean_i sum_j a*_ij log(max(a_ij, 1e-12))

    over heads and real tokens, a and a* the normalised weights. O(T (D + V)) memory.

    Args, beside those of ``hybrid_attention``:
        xent: also compute the cross-entropy; else it is 0.

    Returns:
        Transfer(teacher, mse, xent): [B, H, T, V] in q's dtype, and two 0-dim fp32 tensors. The
        losses are differentiable in the maps and gate alone: no gradient reaches q, k or v, nor
        flows through teacher.

    Raises:
        TypeError, ValueError: as ``hybrid_attention``.

    Source: LoLCATs, arXiv 2410.10254, section 3.2.

    >>> import torch
    >>> from lolcats_ops.features import init_weight
    >>> q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
    >>> phi = Features(init_weight(2, 16, 16).requires_grad_())
    >>> loss = attention_transfer(q, k, v, phi, phi, torch.zeros(2), window=8, sink=1).mse
    >>> loss.backward()
    >>> phi.weight.grad.shape
    torch.Size([2, 16, 16])
    """
    op = "attention_transfer"
    q, k, v = autocast(q, k, v)
    check_attention(op, q, k, v, feature_q, feature_k, cu_seqlens, key_padding_mask)
    check_gate(op, gate, q)
    check_window(op, window, window_kind, sink)
    check_flags(op, affine=affine, xent=xent)
    masked = key_padding_mask is not None
    windows = {"window": window, "window_kind": window_kind, "sink": sink}
    chosen = select(op, backend, q, v, feature_k, **windows, key_padding_mask=masked)
    if chosen == "reference":
        return reference.attention_transfer(
            q,
            k,
            v,
            feature_q,
            feature_k,
            gate,
            window=window,
            window_kind=window_kind,
            sink=sink,
            scale=scale,
            affine=affine,
            xent=xent,
            cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask,
        )
    teacher, mse, cross, *_ = _call(
        chosen,
        *attention_tensors(q.detach(), k.detach(), v.detach(), feature_q, feature_k, gate),
        contiguous(cu_seqlens),
        contiguous(key_padding_mask),
        xent,
        window,
        window_code(window_kind),
        sink,
        scale_or_default(op, scale, q),
        affine,
        *feature_q.codes,
    )
    return Transfer(teacher, mse, cross)


@register_fake("attention_transfer")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor | tuple[Tensor, ...]:
    def empty(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    rows = q.shape[:3]
    statistics = (empty(*rows, v.shape[3]), *(empty(*rows) for _ in range(4)))
    return empty_rows(q, v.shape[3]), empty(), empty(), *statistics


@register_fake("attention_transfer_backward")
def _(
    d_mse: Tensor, d_xent: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> Tensor | tuple[Tensor, ...]:
    return empty_parameters(*args[:5], like=d_mse)


_TENSORS = 10  # the inputs up to key_padding_mask
_PARAMETERS = slice(3, 8)  # of which weights, biases and gate have a gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    teacher, _, _, *statistics = output
    ctx.save_for_backward(*inputs[:_TENSORS], *statistics)
    ctx.settings = inputs[_TENSORS:]
    ctx.mark_non_differentiable(teacher, *statistics)
    ctx.set_materialize_grads(False)


def _backward(
    operators: Any, ctx: Any, _teacher: None, d_mse: Tensor | None, d_xent: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    zero = tensors[-1].new_zeros(())
    d_mse, d_xent = (zero if d is None else d for d in (d_mse, d_xent))
    gradients = operators.attention_transfer_backward(d_mse, d_xent, *tensors, *ctx.settings)
    parameters = present(gradients, tensors[_PARAMETERS])
    rest = _TENSORS - _PARAMETERS.stop + len(ctx.settings)
    return None, None, None, *parameters, *(None for _ in range(rest))


_call = differentiable("attention_transfer", _setup_context, _backward)
register_vmap("attention_transfer")
register_vmap("attention_transfer_backward")
register_autocast("attention_transfer")
