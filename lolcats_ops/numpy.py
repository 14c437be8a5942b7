"""The operators on NumPy arrays, without torch: the arguments of the functions of ``lolcats_ops``,
but that a state is continued by ``hybrid_attention_step_`` alone.

Arrays are float32, float16 or ``ml_dtypes.bfloat16`` with any strides, the last dimension
contiguous; nothing is copied. Every function raises ValueError for shapes, dtypes and values that
the kernels refuse, naming the argument. Gradients are in ``lolcats_ops._C``, under the schemas of
``torch.ops.lolcats_ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _C
from ._codes import ACTIVATIONS, TWO_SIDED, WINDOW_KINDS

Array = NDArray[Any]


@dataclass(frozen=True)
class Features:
    """A learned feature map, SPEC 1: weight [Hf, D, f], bias [Hf, f] or None."""

    weight: Array
    bias: Array | None = None
    activation: str = "softmax"
    two_sided: bool = True
    skip: bool = False
    eps: float = 1e-12

    @property
    def out_features(self) -> int:
        """F, the width after the activation."""
        return self.weight.shape[2] * (2 if self._doubles else 1)

    @property
    def _doubles(self) -> bool:
        return self.two_sided and self.activation in TWO_SIDED

    def _parameters(self) -> tuple[Array, Array | None]:
        return _contiguous(self.weight), None if self.bias is None else _contiguous(self.bias)

    def _settings(self) -> tuple[int, bool, bool, float]:
        activation = _code(self.activation, ACTIVATIONS, "activation")
        return activation, self._doubles, self.skip, self.eps


class State(NamedTuple):
    """The recurrent state of P sequences, SPEC 5, that :func:`hybrid_attention_step_` updates."""

    kv: Array  # [P, Hs, F, V] fp32
    ksum: Array  # [P, Hs, F] fp32
    k_ring: Array  # [P, Hk, R, D]
    v_ring: Array  # [P, Hk, R, V]
    k_sink: Array  # [P, Hk, s, D]
    v_sink: Array  # [P, Hk, s, V]
    length: Array  # [P] int64
    folded: Array  # [P] int64

    @classmethod
    def empty(
        cls, batch: int, k: Array, v: Array, feature_k: Features, *, ring: int, sink: int = 0
    ) -> State:
        """The state of ``batch`` sequences before their first token.

        ``k`` and ``v`` ([., Hk, ., D|V]) give heads, widths and dtype. ``ring`` is at least the
        window (sliding) or two windows (terrace); what it has beyond can be rewound.
        """
        (_, kv_heads, _, head_dim), value_dim = k.shape, v.shape[3]
        heads, width = feature_k.weight.shape[0], feature_k.out_features

        def zeros(*shape: int, dtype: Any) -> Array:
            return np.zeros_like(k, dtype, "C", shape=shape)

        return cls(
            zeros(batch, heads, width, value_dim, dtype=np.float32),
            zeros(batch, heads, width, dtype=np.float32),
            zeros(batch, kv_heads, ring, head_dim, dtype=k.dtype),
            zeros(batch, kv_heads, ring, value_dim, dtype=v.dtype),
            zeros(batch, kv_heads, sink, head_dim, dtype=k.dtype),
            zeros(batch, kv_heads, sink, value_dim, dtype=v.dtype),
            zeros(batch, dtype=np.int64),
            zeros(batch, dtype=np.int64),
        )


class Transfer(NamedTuple):
    """Teacher output [B, H, T, V] and the losses of the student."""

    teacher: Array
    mse: float
    xent: float


def feature_map(x: Array, features: Features) -> Array:
    """phi(x), SPEC 1: [B, H, T, D] -> [B, H, T, F].

    >>> x = np.random.default_rng(0).standard_normal((1, 2, 5, 4), np.float32)
    >>> y = feature_map(x, Features(np.eye(4)[None].repeat(2, 0)))
    >>> y.shape, bool(np.allclose(y.sum(-1), 2))
    ((1, 2, 5, 8), True)
    """
    return _C.feature_map(x, *features._parameters(), *features._settings())


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_q: Features | None = None,
    feature_k: Features | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-12,
    state: tuple[Array, Array] | None = None,
    return_state: bool = False,
    cu_seqlens: Array | None = None,
    key_padding_mask: Array | None = None,
) -> Any:
    """Causal linear attention, SPEC 4: y [B, H, T, V], or (y, (kv, ksum)) with ``return_state``.

    Without feature maps q and k are the features.
    """
    if (feature_q is None) != (feature_k is None):
        raise ValueError("linear_attention: feature_q and feature_k go together, got one of them")
    maps: tuple[Array | None, ...] = (None, None, None, None)
    settings = (0, False, False, 0.0)
    if feature_q is not None and feature_k is not None:
        maps = (*feature_q._parameters(), *feature_k._parameters())
        settings = _shared_settings(feature_q, feature_k)
    out, _, kv, ksum = _C.linear_attention(
        *(q, k, v, *maps, *(state or (None, None)), cu_seqlens, key_padding_mask),
        *(scale, normalize, eps, *settings),
    )
    return (out, (kv, ksum)) if return_state else out


def hybrid_attention(
    q: Array,
    k: Array,
    v: Array,
    feature_q: Features,
    feature_k: Features,
    gate: Array,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    sink: int = 0,
    scale: float | None = None,
    affine: bool = False,
    cu_seqlens: Array | None = None,
    key_padding_mask: Array | None = None,
) -> Array:
    """Window softmax and linear attention under one denominator, SPEC 3: [B, H, T, V].

    q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, V], gate [H] before the sigmoid.
    """
    return _C.hybrid_attention(
        *_inputs(q, k, v, feature_q, feature_k, gate),
        *(cu_seqlens, key_padding_mask, window, _window_code(window_kind), sink),
        *(_scale(scale, q), affine, *_shared_settings(feature_q, feature_k)),
    )[0]


def hybrid_attention_step_(
    q: Array,
    k: Array,
    v: Array,
    feature_q: Features,
    feature_k: Features,
    gate: Array,
    state: State,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    state_indices: Array | None = None,
    scale: float | None = None,
    affine: bool = False,
) -> Array:
    """Append T tokens per sequence to ``state``, in place, and return their outputs, SPEC 5."""
    return _C.hybrid_attention_step_(
        *_inputs(q, k, v, feature_q, feature_k, gate),
        *(*state, state_indices, None, None, window, _window_code(window_kind)),
        *(_scale(scale, q), affine, *_shared_settings(feature_q, feature_k)),
    )


def attention_transfer(
    q: Array,
    k: Array,
    v: Array,
    feature_q: Features,
    feature_k: Features,
    gate: Array,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    sink: int = 0,
    scale: float | None = None,
    affine: bool = False,
    xent: bool = False,
    cu_seqlens: Array | None = None,
    key_padding_mask: Array | None = None,
) -> Transfer:
    """Softmax teacher and how far the hybrid student is from it, SPEC 7."""
    teacher, mse, cross_entropy, *_ = _C.attention_transfer(
        *_inputs(q, k, v, feature_q, feature_k, gate),
        *(cu_seqlens, key_padding_mask, xent, window, _window_code(window_kind), sink),
        *(_scale(scale, q), affine, *_shared_settings(feature_q, feature_k)),
    )
    return Transfer(teacher, float(mse), float(cross_entropy))


def _inputs(
    q: Array, k: Array, v: Array, feature_q: Features, feature_k: Features, gate: Array
) -> tuple[Array | None, ...]:
    return q, k, v, *feature_q._parameters(), *feature_k._parameters(), _contiguous(gate)


def _contiguous(parameter: Array) -> Array:
    return parameter.astype(np.float32, order="C", copy=False)


def _shared_settings(q: Features, k: Features) -> tuple[int, bool, bool, float]:
    if q._settings() != k._settings():
        raise ValueError(
            "feature_q and feature_k differ in activation, two_sided, skip or eps: "
            f"{q._settings()} and {k._settings()}"
        )
    return q._settings()


def _scale(scale: float | None, q: Array) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _window_code(window_kind: str) -> int:
    return _code(window_kind, WINDOW_KINDS, "window_kind")


def _code(name: str, names: tuple[str, ...], argument: str) -> int:
    if name not in names:
        raise ValueError(f"{argument} is {name!r}, needs one of {', '.join(names)}")
    return names.index(name)
