"""The checks of all operators, called once where a call enters.

Messages read ``op: argument is what it is, needs what would do``. Checks look at shapes, dtypes and
devices; the one value that is looked at is the gate, and only where that costs no synchronisation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._codes import WINDOW_KINDS
from .._sizes import check_size
from ..features import Features
from ..state import HybridState, is_readable


def check_feature_map(x: Tensor, features: Features) -> None:
    """The arguments of feature_map."""
    op = "feature_map"
    _check_rows(op, "x", x)
    _check_features(op, "features", features, x, (x.shape[1],))


def check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features | None,
    feature_k: Features | None,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> None:
    """What all attentions share: q, k, v, their feature maps, packing and padding."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(op, name, x)
        _check_like(op, name, x, q)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        _fail(
            op, f"k has shape {_shape(k)}", f"[B, Hk, T, D] with q's B={q.shape[0]}, T={q.shape[2]}"
        )
    if k.shape[3] != q.shape[3]:
        _fail(op, f"k has head dim {k.shape[3]}", f"q's {q.shape[3]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads == 0:
        _fail(op, f"q has shape {_shape(q)}", "at least one head")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: k has {kv_heads} heads, which does not divide q's {heads}")
    if v.shape[:3] != k.shape[:3]:
        _fail(op, f"v has shape {_shape(v)}", f"[B, Hk, T, V] with k's {list(k.shape[:3])}")
    if feature_q is None or feature_k is None:
        missing = "feature_q" if feature_q is None else "feature_k"
        if op != "linear_attention":
            raise TypeError(f"{op}: {missing} is None, needs Features")
        if feature_q is not feature_k:
            _fail(op, f"{missing} is None", "both feature maps or neither")
    if feature_q is not None and feature_k is not None:
        _check_features(op, "feature_q", feature_q, q, (heads, kv_heads))
        _check_features(op, "feature_k", feature_k, q, (heads, kv_heads))
        if feature_q.kind != feature_k.kind:
            _fail(
                op,
                f"feature_k has (activation, two_sided, skip, eps, f) = {feature_k.kind}",
                f"feature_q's {feature_q.kind}",
            )
    _check_sequences(op, q, cu_seqlens, key_padding_mask)


def check_gate(op: str, gate: Tensor, q: Tensor) -> None:
    """gate: [H], finite."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"{op}: gate is a {type(gate).__name__}, needs a tensor [H]")
    if tuple(gate.shape) != (q.shape[1],):
        _fail(op, f"gate has shape {_shape(gate)}", f"[H] = [{q.shape[1]}]")
    _check_parameter(op, "gate", gate, q)
    if not is_readable(gate) or math.isfinite(gate.detach().sum().item()):
        return
    if not bool(gate.isfinite().all()):  # a sum may overflow
        _fail(op, f"gate is {gate.tolist()}", "finite numbers")


def check_flags(op: str, **flags: bool) -> None:
    """Arguments that are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} is {value!r}, needs a bool")


def check_window(op: str, window: int, window_kind: str, sink: int) -> None:
    """window, sink >= 0 and a known kind."""
    for name, value in (("window", window), ("sink", sink)):
        if not isinstance(value, torch.SymInt):
            check_size(op, name, value, 0)
    if window_kind not in WINDOW_KINDS:
        _fail(op, f"window_kind is {window_kind!r}", f"one of {', '.join(WINDOW_KINDS)}")


def check_state(
    op: str,
    state: HybridState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_k: Features | None,
    *,
    slots: int | None,
    **settings: Any,
) -> None:
    """A state that fits q, k, v and feature_k, has ``slots`` slots and these ``settings``."""
    if not isinstance(state, HybridState):
        raise TypeError(f"{op}: state is a {type(state).__name__}, needs a HybridState")
    for name, value in settings.items():
        if getattr(state, name) != value:
            _fail(op, f"state has {name} {getattr(state, name)!r}", f"{value!r}")
    slots = state.batch if slots is None else slots
    heads, width = (
        (k.shape[1], k.shape[3]) if feature_k is None else (feature_k.heads, feature_k.out_features)
    )
    kv_heads, value_dim = v.shape[1], v.shape[3]
    needs = {
        "kv": (slots, heads, width, value_dim),
        "ksum": (slots, heads, width),
        "length": (slots,),
        "folded": (slots,),
        "k_ring": (slots, kv_heads, state.ring, k.shape[3]),
        "v_ring": (slots, kv_heads, state.ring, value_dim),
        "k_sink": (slots, kv_heads, state.sink, k.shape[3]),
        "v_sink": (slots, kv_heads, state.sink, value_dim),
    }
    for name, shape in needs.items():
        x = getattr(state, name)
        if tuple(x.shape) != shape:
            _fail(op, f"state.{name} has shape {_shape(x)}", f"{list(shape)}")
        if x.device != q.device:
            _fail(op, f"state.{name} is on {x.device}", f"q's {q.device}")
        if name[1:] in ("_ring", "_sink"):
            if x.numel() and x.dtype != q.dtype:
                _fail(op, f"state.{name} is {_dtype(x)}", f"q's {_dtype(q)}")
            continue
        counts = name in ("length", "folded")
        dtype = torch.int64 if counts else torch.promote_types(q.dtype, torch.float32)
        if x.dtype != dtype:
            _fail(op, f"state.{name} is {_dtype(x)}", str(dtype).removeprefix("torch."))


def check_state_indices(op: str, state_indices: Tensor, q: Tensor) -> None:
    """state_indices: [B] int32 or int64. On the CPU the kernels also refuse slots that the pool
    does not have, or that come twice."""
    if not isinstance(state_indices, Tensor):
        raise TypeError(f"{op}: state_indices is a {type(state_indices).__name__}, needs a tensor")
    if tuple(state_indices.shape) != (q.shape[0],):
        _fail(op, f"state_indices has shape {_shape(state_indices)}", f"[B] = [{q.shape[0]}]")
    _check_integers(op, "state_indices", state_indices, q)


def check_inference(op: str, *tensors: Tensor | None) -> None:
    """No gradient is asked of an operator that has none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{op}: an input requires grad, but attention on a recurrent state is inference only: "
            f"call it under torch.no_grad(), or train with hybrid_attention without state"
        )


def check_no_tangents(op: str, *arguments: Any) -> None:
    """No forward-mode derivative is asked of kernels, which have none: torch would make it 0."""
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments
    ):
        raise NotImplementedError(
            f"{op}: an input has a tangent, but the kernels have no forward-mode derivative; "
            "backend='reference' has one"
        )


def _check_rows(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, needs a tensor")
    if x.ndim != 4:
        _fail(op, f"{name} has shape {_shape(x)}", "4 dimensions [B, H, T, D]")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} is {_dtype(x)}, needs a floating dtype")
    if x.shape[3] == 0:
        _fail(op, f"{name} has shape {_shape(x)}", "a last dimension of at least 1")


def _check_like(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{op}: {name} is {_dtype(x)}, needs q's {_dtype(q)}")
    if x.device != q.device:
        _fail(op, f"{name} is on {x.device}", f"q's {q.device}")


def _check_features(
    op: str, name: str, features: Features, x: Tensor, heads: tuple[int, ...]
) -> None:
    if not isinstance(features, Features):
        raise TypeError(f"{op}: {name} is a {type(features).__name__}, needs Features")
    if features.head_dim != x.shape[3]:
        _fail(op, f"{name}.weight has D={features.head_dim}", f"the head dim {x.shape[3]}")
    if len(heads) == 1 and heads[0] % features.heads:
        raise ValueError(
            f"{op}: {name} has {features.heads} heads, which does not divide x's {heads[0]}"
        )
    # By ==: where sizes are symbols of a compiler, `in` would ask whether they are the same object.
    if len(heads) == 2 and not any(features.heads == h for h in heads):
        _fail(op, f"{name} has {features.heads} heads", f"q's {heads[0]} or k's {heads[1]}")
    _check_parameter(op, f"{name}.weight", features.weight, x)
    if features.bias is not None:
        _check_parameter(op, f"{name}.bias", features.bias, x)


def _check_parameter(op: str, name: str, p: Tensor, x: Tensor) -> None:
    if not p.is_floating_point():
        raise TypeError(f"{op}: {name} is {_dtype(p)}, needs a floating dtype")
    if p.device != x.device:
        _fail(op, f"{name} is on {p.device}", f"the inputs' {x.device}")


def _check_sequences(op: str, q: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    for name, x in (("cu_seqlens", cu_seqlens), ("key_padding_mask", mask)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is a {type(x).__name__}, needs a tensor")
    if cu_seqlens is not None and mask is not None:
        raise ValueError(f"{op}: cu_seqlens and key_padding_mask are both given, needs one of them")
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            _fail(op, f"cu_seqlens has shape {_shape(cu_seqlens)}", "[N + 1]")
        if q.shape[0] != 1:
            _fail(op, f"cu_seqlens is given and B is {q.shape[0]}", "the sequences packed into B=1")
        _check_integers(op, "cu_seqlens", cu_seqlens, q)
    if mask is not None:
        if tuple(mask.shape) != (q.shape[0], q.shape[2]):
            _fail(
                op,
                f"key_padding_mask has shape {_shape(mask)}",
                f"[B, T] = {[q.shape[0], q.shape[2]]}",
            )
        if mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: key_padding_mask is {_dtype(mask)}, needs bool, True for real tokens"
            )
        if mask.device != q.device:
            _fail(op, f"key_padding_mask is on {mask.device}", f"q's {q.device}")


def _check_integers(op: str, name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} is {_dtype(x)}, needs int32 or int64")
    if x.device != q.device:
        _fail(op, f"{name} is on {x.device}", f"q's {q.device}")


def _fail(op: str, got: str, needs: str) -> None:
    raise ValueError(f"{op}: {got}, needs {needs}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
