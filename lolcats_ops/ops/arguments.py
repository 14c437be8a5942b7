"""Python's arguments as those of torch.ops.lolcats_ops; shapes and layouts of the results."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .._codes import ACTIVATIONS, WINDOW_KINDS
from ..features import LARGEST, Features, out_features


def last_contiguous(x: Tensor) -> Tensor:
    """x with stride 1 in its last dimension, which is all that the kernels ask of activations."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def parameter(x: Tensor) -> Tensor:
    """A parameter as the kernels take it, fp32 and contiguous; differentiable."""
    if x.dtype is torch.float32 and x.is_contiguous():
        return x  # a decode step would spend two microseconds on calls that change nothing
    return x.to(torch.float32).contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """cu_seqlens, a mask or indices as the kernels take them."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def parameters(features: Features | None) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) of a feature map as the operators take them."""
    if features is None:
        return None, None
    return parameter(features.weight), None if features.bias is None else parameter(features.bias)


def width_after(activation: int, two_sided: bool, width: int) -> int:
    """F, from the arguments of an operator."""
    return out_features(width, ACTIVATIONS[activation], two_sided)


def present(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Operators return an empty gradient for an absent input; autograd wants None."""
    return [None if x is None else g for g, x in zip(gradients, inputs, strict=True)]


def holds(condition: bool | torch.SymBool, if_unknown: bool) -> bool:
    """A condition on sizes, of which a compiler may not know those that depend on data."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental import symbolic_shapes  # loads sympy

    guard = symbolic_shapes.guard_or_true if if_unknown else symbolic_shapes.guard_or_false
    return guard(condition)


def empty_rows(x: Tensor, width: int) -> Tensor:
    """An output [B, H, T, width] for x [B, H, T, X], in x's dtype and memory order.

    Where x is a transposed [B, T, H, X], so is the output: callers that merge heads get it without
    a copy.
    """
    batch, heads, length, _ = x.shape
    merged = holds(x.stride(1) < x.stride(2), if_unknown=False)
    if merged and heads > 1 and holds(length > 1, if_unknown=True):
        return x.new_empty(batch, length, heads, width).transpose(1, 2)
    return x.new_empty(batch, heads, length, width)


def empty_parameters(*parameters: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
    """fp32 gradients of ``parameters``; an absent one has an empty gradient."""
    return tuple(
        like.new_empty((0,) if p is None else p.shape, dtype=torch.float32) for p in parameters
    )


def attention_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
) -> tuple[Tensor | None, ...]:
    """(q, k, v, weight_q, bias_q, weight_k, bias_k, gate) as the operators take them."""
    return (
        *map(last_contiguous, (q, k, v)),
        *parameters(feature_q),
        *parameters(feature_k),
        parameter(gate),
    )


def check_number(op: str, name: str, value: float, least: float = -LARGEST) -> None:
    """Raises TypeError for what is no number, or a tensor that wants a gradient, which it would not
    get, ValueError for what float32 does not hold, or less than ``least``."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{op}: {name} is a tensor that requires grad, needs a number: it gets no gradient"
        )
    if not isinstance(value, (Real, Tensor, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} is {value!r}, needs a number")
    if isinstance(value, Real) and not least <= value <= LARGEST:
        bound = f", >= {least}" if least > -LARGEST else ""
        raise ValueError(f"{op}: {name} is {value}, needs a finite number of float32{bound}")


def window_code(window_kind: str) -> int:
    """The window kind's number in the C ABI."""
    return WINDOW_KINDS.index(window_kind)


def scale_or_default(op: str, scale: float | None, q: Tensor) -> float:
    """``scale``, or D ** -0.5."""
    if scale is None:
        return q.shape[-1] ** -0.5
    check_number(op, "scale", scale)
    return scale
