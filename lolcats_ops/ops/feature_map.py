"""phi(x), the learned feature map (SPEC 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..dispatch import select
from ..features import Features
from .arguments import (
    empty_parameters,
    empty_rows,
    last_contiguous,
    parameters,
    present,
    width_after,
)
from .registration import autocast, differentiable, register_autocast, register_fake, register_vmap
from .validation import check_feature_map


def feature_map(x: Tensor, features: Features, *, backend: str | None = None) -> Tensor:
    """phi(x) = clamp(act(x @ weight[h] + bias[h] (+ x if skip)), min=eps), in one pass.

    Args:
        x: [B, H, T, D], fp32, bf16 or fp16; D and f are at most 256. The backend "reference" takes
            any dtype that torch computes in and any D and f.
        features: the map, with Hf == H, or with Hf dividing H: head h then uses map h // (H / Hf).
        backend: None for the best on x's device, or one of ``lolcats_ops.backends()``.

    Returns:
        [B, H, T, F] in x's dtype; F = features.out_features. Differentiable in x, weight and bias.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or a backend that
            cannot run the case.

    Source: Hedgehog, arXiv 2402.04347; Performer (favor), arXiv 2009.14794.

    >>> import torch
    >>> from lolcats_ops.features import init_weight
    >>> feature_map(torch.randn(1, 2, 5, 16), Features(init_weight(2, 16, 8))).shape
    torch.Size([1, 2, 5, 16])
    """
    (x,) = autocast(x)
    check_feature_map(x, features)
    chosen = select("feature_map", backend, x, features=features)
    if chosen == "reference":
        return reference.feature_map(x, features)
    return _call(chosen, last_contiguous(x), *parameters(features), *features.codes)


@register_fake("feature_map")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, two_sided: bool, *_: Any
) -> Tensor | tuple[Tensor, ...]:
    return empty_rows(x, width_after(activation, two_sided, weight.shape[2]))


@register_fake("feature_map_backward")
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> Tensor | tuple[Tensor, ...]:
    return empty_rows(x, x.shape[3]), *empty_parameters(weight, bias, like=x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.codes = inputs[3:]


def _backward(operators: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = operators.feature_map_backward(last_contiguous(dy), *tensors, *ctx.codes)
    return *present(gradients, tensors), *(None for _ in ctx.codes)


_call = differentiable("feature_map", _setup_context, _backward)
register_vmap("feature_map", rows=True)
register_vmap("feature_map_backward")
register_autocast("feature_map")
