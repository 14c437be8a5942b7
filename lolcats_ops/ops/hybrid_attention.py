"""Softmax over a window and a learned feature map beyond it, under one denominator (SPEC 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import reference
from ..dispatch import select
from ..features import Features
from ..state import HybridState, sequence_count
from .arguments import (
    attention_tensors,
    contiguous,
    empty_parameters,
    empty_rows,
    last_contiguous,
    present,
    scale_or_default,
    window_code,
)
from .hybrid_attention_step import step_
from .registration import autocast, differentiable, register_autocast, register_fake, register_vmap
from .validation import (
    check_attention,
    check_flags,
    check_gate,
    check_inference,
    check_state,
    check_window,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Settings(TypedDict, total=False):
    """What hybrid_attention takes besides, with or without a state to return."""

    window: int
    window_kind: str
    sink: int
    scale: float | None
    affine: bool
    state: HybridState | None
    cu_seqlens: Tensor | None
    key_padding_mask: Tensor | None
    backend: str | None


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    *,
    return_state: Literal[False] = False,
    **settings: Unpack[Settings],
) -> Tensor: ...
@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    *,
    return_state: Literal[True],
    **settings: Unpack[Settings],
) -> tuple[Tensor, HybridState]: ...
@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    *,
    return_state: bool,
    **settings: Unpack[Settings],
) -> Tensor | tuple[Tensor, HybridState]: ...
def hybrid_attention(
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
    state: HybridState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, HybridState]:
    """y_i = num_i / den_i, where den_i is num_i with v_j = 1 and, with g = sigmoid(gate),

        num_i = g * sum_{j in W(i)} exp(s_ij - max s_i) v_j
            + lam * sum_{j in N(i)} (phi_q(q_i) . phi_k(k_j)) v_j

    s_ij = scale * q_i . k_j. W(i): the keys j <= i from the window start e(i) on, and the first
    ``sink`` keys; N(i): the other keys j <= i. lam is 1, or 1 - g where ``affine`` and there is a
    window or a sink.

    Args:
        q: [B, H, T, D], fp32, bf16 or fp16; D, V and f are at most 256, but for the reference.
        k: [B, Hk, T, D], Hk dividing H.
        v: [B, Hk, T, V].
        feature_q, feature_k: the maps, each with H or Hk heads and alike in all but parameters.
        gate: [H], raw: the sigmoid is taken inside, of -60 at least.
        window: w >= 0; 0 is linear attention, w >= T softmax attention.
        window_kind: "sliding", e(i) = max(0, i - w + 1), or "terrace", e(i) = max(0, (floor(i / w)
            - 1) w).
        sink: first keys that every query attends by softmax.
        scale: None for D ** -0.5.
        affine: whether lam is 1 - g.
        state: continue after these tokens (a copy; ``hybrid_attention_step_`` updates in place);
            one sequence per row, or per packed sequence; its window, window_kind and sink must be
            those given.
        return_state: also return the state after the last token. With a state, in or out, the call
            is inference only.
        cu_seqlens: [N + 1] int, bounds of N sequences packed into B = 1; rows past the last are 0.
        key_padding_mask: [B, T] bool, True where the token is real. Padded queries return 0.
        backend: None for the best on q's device, or one of ``lolcats_ops.backends()``.

    Returns:
        [B, H, T, V] in q's dtype, or (that, HybridState). Differentiable in q, k, v, the maps and
        gate.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, a gate that is not finite
            (looked at on the CPU, outside of tracing), a gradient asked of a call with a state, or
            a backend that cannot run the case.

    Source: LoLCATs, arXiv 2410.10254.

    >>> import torch
    >>> from lolcats_ops.features import init_weight
    >>> q, k, v = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16)
    >>> phi_q, phi_k = Features(init_weight(4, 16, 16)), Features(init_weight(4, 16, 16))
    >>> hybrid_attention(q, k, v, phi_q, phi_k, torch.zeros(4), window=32, sink=1).shape
    torch.Size([1, 4, 100, 16])
    """
    op = "hybrid_attention"
    q, k, v = autocast(q, k, v)
    check_attention(op, q, k, v, feature_q, feature_k, cu_seqlens, key_padding_mask)
    check_gate(op, gate, q)
    check_window(op, window, window_kind, sink)
    check_flags(op, affine=affine)
    sequences = sequence_count(q, cu_seqlens)
    settings: dict[str, Any] = {"window": window, "window_kind": window_kind, "sink": sink}
    if state is not None:
        check_state(op, state, q, k, v, feature_k, slots=sequences, **settings)
    on_state = state is not None or return_state
    if on_state:
        tensors = () if state is None else state.tensors.values()
        check_inference(op, q, k, v, gate, *feature_q.tensors, *feature_k.tensors, *tensors)
    chosen = select(
        "hybrid_attention_step_" if on_state else op,
        backend,
        q,
        v,
        feature_k,
        **settings,
        key_padding_mask=key_padding_mask is not None,
    )
    if chosen == "reference":
        return reference.hybrid_attention(
            q,
            k,
            v,
            feature_q,
            feature_k,
            gate,
            **settings,
            scale=scale,
            affine=affine,
            state=state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask,
        )
    if not on_state:
        out, _, _ = _call(
            chosen,
            *attention_tensors(q, k, v, feature_q, feature_k, gate),
            contiguous(cu_seqlens),
            contiguous(key_padding_mask),
            window,
            window_code(window_kind),
            sink,
            scale_or_default(op, scale, q),
            affine,
            *feature_q.codes,
        )
        return out
    if state is None:
        state = HybridState.empty_for(k, v, feature_k, batch=sequences, **settings)
    else:
        state = state.clone()
    out = step_(
        chosen,
        q,
        k,
        v,
        feature_q,
        feature_k,
        gate,
        state,
        cu_seqlens=cu_seqlens,
        key_padding_mask=key_padding_mask,
        scale=scale,
        affine=affine,
    )
    return (out, state) if return_state else out


@register_fake("hybrid_attention")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor | tuple[Tensor, ...]:
    m = q.new_empty(q.shape[:3], dtype=torch.float32)
    return empty_rows(q, v.shape[3]), m, torch.empty_like(m)


@register_fake("hybrid_attention_backward")
def _(do: Tensor, *args: Any) -> Tensor | tuple[Tensor, ...]:
    rows, parameters = args[:3], args[3:_GRADIENTS]
    gradients = empty_parameters(*parameters, like=do)
    return *(empty_rows(x, x.shape[3]) for x in rows), *gradients


_TENSORS = 10  # the inputs up to key_padding_mask
_GRADIENTS = 8  # of which up to gate have one


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, m, den = output
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.settings = inputs[_TENSORS:]
    ctx.mark_non_differentiable(m, den)
    ctx.set_materialize_grads(False)


def _backward(
    operators: Any, ctx: Any, do: Tensor | None, _dm: None, _dden: None
) -> tuple[Tensor | None, ...]:
    if do is None:  # what was made of y has no gradient
        return (None,) * (_TENSORS + len(ctx.settings))
    tensors = ctx.saved_tensors
    gradients = operators.hybrid_attention_backward(last_contiguous(do), *tensors, *ctx.settings)
    rest = _TENSORS - _GRADIENTS + len(ctx.settings)
    return *present(gradients, tensors[:_GRADIENTS]), *(None for _ in range(rest))


_call = differentiable("hybrid_attention", _setup_context, _backward)
register_vmap("hybrid_attention", rows=True)
register_vmap("hybrid_attention_backward")
register_autocast("hybrid_attention")
