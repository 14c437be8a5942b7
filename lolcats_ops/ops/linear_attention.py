"""Causal linear attention with the feature maps fused in (SPEC 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import reference
from .._codes import NO_MAP
from ..dispatch import select
from ..features import Features
from ..state import HybridState, sequence_count
from .arguments import (
    check_number,
    contiguous,
    empty_parameters,
    empty_rows,
    last_contiguous,
    parameters,
    present,
    width_after,
)
from .registration import autocast, differentiable, register_autocast, register_fake, register_vmap
from .validation import check_attention, check_flags, check_state

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Settings(TypedDict, total=False):
    """What linear_attention takes besides, with or without a state to return."""

    feature_q: Features | None
    feature_k: Features | None
    scale: float
    normalize: bool
    eps: float
    state: HybridState | None
    cu_seqlens: Tensor | None
    key_padding_mask: Tensor | None
    backend: str | None


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: Literal[False] = False,
    **settings: Unpack[Settings],
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: Literal[True],
    **settings: Unpack[Settings],
) -> tuple[Tensor, HybridState]: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_state: bool,
    **settings: Unpack[Settings],
) -> Tensor | tuple[Tensor, HybridState]: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_q: Features | None = None,
    feature_k: Features | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-12,
    state: HybridState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, HybridState]:
    """y_i = sum_j a_ij v_j / (sum_j a_ij + eps), j <= i, a_ij = scale * phi_q(q_i) . phi_k(k_j).

    Args:
        q: [B, H, T, D], fp32, bf16 or fp16; D, V and f are at most 256, but for the reference.
        k: [B, Hk, T, D], Hk dividing H.
        v: [B, Hk, T, V].
        feature_q, feature_k: the maps, each with H or Hk heads and alike in all but parameters;
            None (both) takes q and k as the features.
        scale, eps: numbers; ``eps`` is at least 0.
        normalize: False returns the numerator alone.
        state: continue after these tokens: one sequence per row, or per packed sequence.
        return_state: also return the state after the last token.
        cu_seqlens: [N + 1] int, bounds of N sequences packed into B = 1; rows past the last are 0.
        key_padding_mask: [B, T] bool, True where the token is real. Padded queries return 0.
        backend: None for the best on q's device, or one of ``lolcats_ops.backends()``.

    Returns:
        [B, H, T, V] in q's dtype, or (that, HybridState). Differentiable in q, k, v, the maps and
        both states' sums.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot
            run the case; numbers that float32 does not hold, a negative eps.

    Source: Transformers are RNNs, arXiv 2006.16236.

    >>> import torch
    >>> q, k, v = (torch.rand(1, 2, 10, 16) for _ in range(3))
    >>> y, state = linear_attention(q, k, v, return_state=True)
    >>> y.shape, state.kv.shape
    (torch.Size([1, 2, 10, 16]), torch.Size([1, 2, 16, 16]))
    """
    op = "linear_attention"
    q, k, v = autocast(q, k, v)
    check_attention(op, q, k, v, feature_q, feature_k, cu_seqlens, key_padding_mask)
    check_flags(op, normalize=normalize)
    check_number(op, "scale", scale)
    check_number(op, "eps", eps, 0)
    sequences = sequence_count(q, cu_seqlens)
    if state is not None:
        check_state(op, state, q, k, v, feature_k, slots=sequences, window=0, sink=0, ring=0)
    masked = key_padding_mask is not None
    chosen = select(op, backend, q, v, feature_k, key_padding_mask=masked)
    if chosen == "reference":
        return reference.linear_attention(
            q,
            k,
            v,
            feature_q=feature_q,
            feature_k=feature_k,
            scale=scale,
            normalize=normalize,
            eps=eps,
            state=state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask,
        )
    out, _, kv, ksum = _call(
        chosen,
        last_contiguous(q),
        last_contiguous(k),
        last_contiguous(v),
        *parameters(feature_q),
        *parameters(feature_k),
        contiguous(None if state is None else state.kv),
        contiguous(None if state is None else state.ksum),
        contiguous(cu_seqlens),
        contiguous(key_padding_mask),
        scale,
        normalize,
        eps,
        *(NO_MAP if feature_q is None else feature_q.codes),
    )
    if not return_state:
        return out
    length = _lengths(q, sequences, cu_seqlens, key_padding_mask)
    if state is not None:
        length = length + state.length
    return out, HybridState.of_sums(
        kv, ksum, length, head_dim=k.shape[3], kv_heads=k.shape[1], dtype=k.dtype
    )


def _lengths(q: Tensor, sequences: int, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    """Real tokens of each sequence, [N] int64."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    if mask is not None:
        return mask.sum(1)
    return torch.full((sequences,), q.shape[2], dtype=torch.int64, device=q.device)


@register_fake("linear_attention")
def _(
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
    activation: int,
    two_sided: bool,
    *_: Any,
) -> Tensor | tuple[Tensor, ...]:
    sequences = sequence_count(q, cu_seqlens)
    heads, width = k.shape[1], k.shape[3]
    if weight_k is not None:
        heads, width = weight_k.shape[0], width_after(activation, two_sided, weight_k.shape[2])
    sums = (sequences, heads, width)
    return (
        empty_rows(q, v.shape[3]),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty((*sums, v.shape[3]), dtype=torch.float32),
        q.new_empty(sums, dtype=torch.float32),
    )


@register_fake("linear_attention_backward")
def _(
    do: Tensor, dkv: Tensor | None, dksum: Tensor | None, *args: Any
) -> Tensor | tuple[Tensor, ...]:
    rows, parameters_and_states = args[:3], args[3:9]
    gradients = empty_parameters(*parameters_and_states, like=do)
    return *(empty_rows(x, x.shape[3]) for x in rows), *gradients


_TENSORS = 11  # the inputs up to key_padding_mask
_GRADIENTS = 9  # of which up to ksum0 have one


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, den, _, _ = output
    ctx.save_for_backward(*inputs[:_TENSORS], out, den)
    ctx.settings = inputs[_TENSORS:]
    ctx.mark_non_differentiable(den)
    ctx.set_materialize_grads(False)


def _backward(
    operators: Any,
    ctx: Any,
    do: Tensor | None,
    _dden: None,
    dkv: Tensor | None,
    dksum: Tensor | None,
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    do = torch.zeros_like(tensors[_TENSORS]) if do is None else last_contiguous(do)
    dkv, dksum = (None if x is None else x.contiguous() for x in (dkv, dksum))
    gradients = operators.linear_attention_backward(do, dkv, dksum, *tensors, *ctx.settings)
    rest = _TENSORS - _GRADIENTS + len(ctx.settings)
    return *present(gradients, tensors[:_GRADIENTS]), *(None for _ in range(rest))


_call = differentiable("linear_attention", _setup_context, _backward)
register_vmap("linear_attention", rows=True)
register_vmap("linear_attention_backward")
register_autocast("linear_attention")
