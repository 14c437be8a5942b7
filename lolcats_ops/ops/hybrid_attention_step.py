"""A few more tokens of hybrid attention on a recurrent state, in place (SPEC 5)."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from .. import reference
from ..dispatch import select
from ..features import Features
from ..state import STATE_TENSORS, HybridState
from .arguments import (
    attention_tensors,
    contiguous,
    empty_rows,
    scale_or_default,
    window_code,
)
from .registration import (
    autocast,
    operators,
    refusals_of,
    register_autocast,
    register_fake,
    register_vmap,
)
from .validation import (
    check_attention,
    check_flags,
    check_gate,
    check_inference,
    check_no_tangents,
    check_state,
    check_state_indices,
)

_OP = "hybrid_attention_step_"
_on_cpu = torch.ops.lolcats_ops.hybrid_attention_step_.default
_on_cuda = torch.ops.lolcats_ops_cuda.hybrid_attention_step_.default
_state_tensors = attrgetter(*STATE_TENSORS)  # without the dict of HybridState.tensors


def hybrid_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    state: HybridState,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    affine: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Appends T tokens per sequence to ``state``, in place, and returns their outputs.

    T = 1 is the decode step. One call with T tokens is T calls with one, and equals
    ``hybrid_attention`` over the whole sequence.

    Args:
        q: [B, H, T, D], fp32, bf16 or fp16; k: [B, Hk, T, D]; v: [B, Hk, T, V]; the new tokens.
        feature_q, feature_k, gate, scale, affine: as in ``hybrid_attention``; window and sinks are
            the state's.
        state: a pool of P slots, written in place.
        state_indices: [B] int, the slot of each sequence, no slot twice; None where P == B. On a
            GPU the kernels skip a sequence whose slot does not exist, such as -1: no state changes,
            and its part of the result means nothing.
        backend: None for the best on q's device, or one of ``lolcats_ops.backends()``.

    Returns:
        [B, H, T, V] in q's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, a gate that is not finite,
            an input that requires grad (inference only), or a backend that cannot run the case. The
            state is then as it was.

    >>> import torch
    >>> from lolcats_ops.features import init_weight
    >>> phi = Features(init_weight(4, 16, 16))
    >>> state = HybridState.empty(1, 4, 2, 16, 16, phi.out_features, window=8, sink=1)
    >>> q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    >>> hybrid_attention_step_(q, k, v, phi, phi, torch.zeros(4), state).shape, state.length.item()
    (torch.Size([1, 4, 1, 16]), 1)
    """
    if backend is None:
        try:
            call = _for_library(
                q, k, v, feature_q, feature_k, gate, state, state_indices, scale, affine
            )
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            call = None  # the checks below name what is wrong
        out = None if call is None else _unless_refused(*call)
        if out is not None:
            increment_version(_state_tensors(state))
            return out
    q, k, v = autocast(q, k, v)
    check_attention(_OP, q, k, v, feature_q, feature_k)
    check_gate(_OP, gate, q)
    check_flags(_OP, affine=affine)
    check_state(_OP, state, q, k, v, feature_k, slots=q.shape[0] if state_indices is None else None)
    if state_indices is not None:
        check_state_indices(_OP, state_indices, q)
    tensors = (*feature_q.tensors, *feature_k.tensors, *state.tensors.values())
    check_inference(_OP, q, k, v, gate, *tensors)
    inputs = (q, k, v, feature_q, feature_k, gate, state)
    options: dict[str, Any] = {"state_indices": state_indices, "scale": scale, "affine": affine}
    chosen = select(_OP, backend, q, v, feature_k, **_windows(state))
    if chosen == "reference":
        return reference.hybrid_attention_step_(*inputs, **options)
    return step_(chosen, *inputs, **options)


def _for_library(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    state: HybridState,
    state_indices: Tensor | None,
    scale: float | None,
    affine: bool,
) -> tuple[Any, ...] | None:
    """The operator and its arguments, where it takes them as they are; None where something has to
    be converted or could be wrong in a way that the C library does not see.

    It makes the other checks in a microsecond, before it writes; in Python they would take as long
    as the step. Triton's kernels have none.
    """
    if (
        type(q) is not Tensor
        or type(state) is not HybridState
        or type(feature_q) is not Features
        or type(feature_k) is not Features
        or type(affine) is not bool
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None  # its samples go one by one
    ):
        return None
    on_cuda = q.is_cuda  # asked once: a property of a tensor takes as long as a line of Python
    codes = feature_q.codes
    weight_q, weight_k = feature_q.weight, feature_k.weight
    if (
        feature_k.codes != codes
        or torch.is_autocast_enabled("cuda" if on_cuda else "cpu")
        or not weight_q.dtype is weight_k.dtype is gate.dtype is torch.float32
    ):
        return None
    inputs = (q, k, v, weight_q, feature_q.bias, weight_k, feature_k.bias, gate)
    pool = _state_tensors(state)
    for x in (*inputs, *pool, state_indices):
        # On mixed devices torch may choose one that writes nothing, such as meta.
        if x is not None and not (x.is_cuda if on_cuda else x.is_cpu):
            return None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *pool)):
        return None
    if on_cuda and select(_OP, None, q, v, feature_k, **_windows(state)) != "cuda":
        return None
    window = (state.window, window_code(state.window_kind))
    settings = (*window, scale_or_default(_OP, scale, q), affine, *codes)
    operator = _on_cuda if on_cuda else _on_cpu
    return operator, *inputs, *pool, state_indices, None, None, *settings


def _unless_refused(operator: Any, *arguments: Any) -> Tensor | None:
    """What the operator returns; None where it refused its arguments, of which it then wrote none.

    Modes and subclasses of tensors may raise after the kernel has run, as torch does where what is
    written is a negated view: then the state has these tokens, and would get them twice.
    """
    try:
        out: Tensor = operator(*arguments)
        return out
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        refused = str(error).startswith(f"{_OP.rstrip('_')}: ")
        intercepted = (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._len_torch_function_stack() > 0
            or any(type(x) not in (Tensor, Parameter) or x.is_neg() for x in tensors)
        )
        if intercepted and not refused:
            raise
        return None


def _windows(state: HybridState) -> dict[str, Any]:
    """What of a state decides who runs it."""
    return {"window": state.window, "window_kind": state.window_kind, "sink": state.sink}


def step_(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    state: HybridState,
    *,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None,
    affine: bool,
) -> Tensor:
    """The operator on checked arguments."""
    maps = (*feature_q.tensors, *feature_k.tensors, gate)
    check_no_tangents(_OP, q, k, v, *maps, *state.tensors.values())
    operator = operators(backend).hybrid_attention_step_
    # Of no keys the dtype means nothing, but the kernels want q's.
    pool = tuple(
        x.to(q.dtype) if name[1:] in ("_ring", "_sink") and not x.numel() else x
        for name, x in state.tensors.items()
    )
    arguments = (
        *attention_tensors(q, k, v, feature_q, feature_k, gate),
        *pool,
        contiguous(state_indices),
        contiguous(cu_seqlens),
        contiguous(key_padding_mask),
        state.window,
        window_code(state.window_kind),
        scale_or_default(_OP, scale, q),
        affine,
        *feature_q.codes,
    )
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with refusals_of(_OP):
        out = operator(*arguments)
    increment_version(pool)  # as torch does it for its own operators
    return out


@register_fake("hybrid_attention_step_")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor | tuple[Tensor, ...]:
    return empty_rows(q, v.shape[3])


register_vmap("hybrid_attention_step_")
register_autocast("hybrid_attention_step_")
