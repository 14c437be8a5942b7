"""The operators on NumPy arrays, without torch: the functions of ``lolcats_ops``, but ``backend``.
``hybrid_attention`` neither takes nor returns a state; that of ``linear_attention`` is (kv, ksum).

Arrays are float32, float16 or ``ml_dtypes.bfloat16`` with any strides, the last dimension
contiguous (all dimensions of states, ``cu_seqlens`` and ``state_indices``); nothing is copied, and
results lie in memory as q does. Parameters (weights, biases, gates) are converted to float32.
Gradients are in ``lolcats_ops._C``, under the schemas of ``torch.ops.lolcats_ops``.

Every function raises, naming the argument:
    TypeError: an argument of another type, an array of a dtype that no operator knows.
    ValueError: shapes, dtypes and values that this one refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from . import _C
from ._codes import ACTIVATIONS, DTYPES, NO_MAP, TWO_SIDED, WINDOW_KINDS, window_span
from ._sizes import check_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Features:
    """A learned feature map, SPEC 1: weight [Hf, D, f], bias [Hf, f] or None. ``two_sided`` is of
    softmax and exp alone.

    >>> Features(np.eye(4)[None]).out_features  # two sides of 4
    8
    """

    weight: Array
    bias: Array | None = None
    activation: str = "softmax"
    two_sided: bool = True
    skip: bool = False
    eps: float = 1e-12

    def __post_init__(self) -> None:
        _check_parameter(self.weight, "Features: weight")
        if self.bias is not None:
            _check_parameter(self.bias, "Features: bias")
        if self.weight.ndim != 3:
            raise ValueError(f"Features: weight has shape {self.weight.shape}, needs [Hf, D, f]")
        _code(self.activation, ACTIVATIONS, "Features: activation")
        for name in ("two_sided", "skip"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"Features: {name} is {value!r}, needs a bool")

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
        return ACTIVATIONS.index(self.activation), self._doubles, self.skip, self.eps


@dataclass(frozen=True, eq=False)
class HybridState:
    """The recurrent state of P sequences, SPEC 5, that :func:`hybrid_attention_step_` updates.

    >>> k, v = np.zeros((2, 1, 2, 7, 4), np.float32)
    >>> phi = Features(np.eye(4)[None].repeat(2, 0))
    >>> state = HybridState.empty_for(k, v, phi, batch=3, window=8, sink=1)
    >>> state.kv.shape, state.k_ring.shape, state.v_sink.shape
    ((3, 2, 8, 4), (3, 2, 8, 4), (3, 2, 1, 4))
    """

    kv: Array  # [P, Hs, F, V] fp32
    ksum: Array  # [P, Hs, F] fp32
    k_ring: Array  # [P, Hk, R, D]
    v_ring: Array  # [P, Hk, R, V]
    k_sink: Array  # [P, Hk, s, D]
    v_sink: Array  # [P, Hk, s, V]
    length: Array  # [P] int64
    folded: Array  # [P] int64
    window: int
    window_kind: str = "sliding"

    @classmethod
    def empty_for(
        cls,
        k: Array,
        v: Array,
        feature_k: Features,
        *,
        batch: int | None = None,
        window: int,
        window_kind: str = "sliding",
        sink: int = 0,
        slack: int = 0,
    ) -> HybridState:
        """The state before the first token, for keys k [B, Hk, T, D], values v [B, Hk, T, V] and
        the map of the keys.

        Args:
            batch: where sequences are packed, or states are a pool, how many; None for B.
            slack: how many of the last tokens stay in the ring beyond the window.
        """
        op = "HybridState.empty_for"
        for name, x in (("k", k), ("v", v)):
            if len(np.shape(x)) != 4 or not hasattr(x, "dtype") or hasattr(x, "mask"):
                raise TypeError(f"{op}: {name} needs to be an array of 4 dimensions, without mask")
            if str(x.dtype) not in DTYPES[:3]:
                raise TypeError(f"{op}: {name} has dtype {x.dtype}, needs {', '.join(DTYPES[:3])}")
        _check_map(feature_k, f"{op}: feature_k")
        (sequences, kv_heads, _, head_dim), value_dim = k.shape, v.shape[3]
        if (v.shape[1], v.dtype) != (kv_heads, k.dtype):
            raise ValueError(
                f"{op}: v has {v.shape[1]} heads of {v.dtype}, needs k's {kv_heads} of {k.dtype}"
            )
        heads, width = feature_k.weight.shape[0], feature_k.out_features
        if feature_k.weight.shape[1] != head_dim or heads % kv_heads:
            raise ValueError(
                f"{op}: feature_k has a weight {list(feature_k.weight.shape)}, needs [Hf, D, f] "
                f"for k's {kv_heads} heads of D = {head_dim}"
            )
        batch = sequences if batch is None else batch
        for name, count in (("batch", batch), ("window", window), ("sink", sink), ("slack", slack)):
            check_size(op, name, count, 0)
        _window_code(op, window_kind)
        window, sink, slack = int(window), int(sink), int(slack)  # they may be of 8 bits
        ring = window_span(window, window_kind) + slack

        def zeros(*shape: int, dtype: Any) -> Array:  # of k's library, NumPy or CuPy
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
            window,
            window_kind,
        )

    @property
    def arrays(self) -> dict[str, Array]:
        """The arrays by name, in the order of the operator's schema."""
        return {name: getattr(self, name) for name in _STATE_ARRAYS}


_STATE_ARRAYS = tuple(f.name for f in fields(HybridState) if not f.name.startswith("window"))


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
    _check_map(features, "feature_map: features")
    return _C.feature_map(x, *features._parameters(), *features._settings())


class LinearSettings(TypedDict, total=False):
    """What linear_attention takes besides, with or without a state to return."""

    feature_q: Features | None
    feature_k: Features | None
    scale: float
    normalize: bool
    eps: float
    state: tuple[Array, Array] | None
    cu_seqlens: Array | None
    key_padding_mask: Array | None


@overload
def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    return_state: Literal[False] = False,
    **settings: Unpack[LinearSettings],
) -> Array: ...
@overload
def linear_attention(
    q: Array, k: Array, v: Array, *, return_state: Literal[True], **settings: Unpack[LinearSettings]
) -> tuple[Array, tuple[Array, Array]]: ...
@overload
def linear_attention(
    q: Array, k: Array, v: Array, *, return_state: bool, **settings: Unpack[LinearSettings]
) -> Array | tuple[Array, tuple[Array, Array]]: ...
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
) -> Array | tuple[Array, tuple[Array, Array]]:
    """Causal linear attention, SPEC 4: y [B, H, T, V], or (y, (kv, ksum)) with ``return_state``.

    q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, V]; without feature maps q and k are the features.
    A state is kv [B, Hs, F, V] and ksum [B, Hs, F], fp32; Hs is the number of feature_k's maps,
    without them Hk.

    >>> q = np.random.default_rng(0).random((1, 2, 5, 4), np.float32)
    >>> y, (kv, ksum) = linear_attention(q, q, q, return_state=True)
    >>> y.shape, kv.shape, bool(np.allclose(ksum, q.sum(2)))
    ((1, 2, 5, 4), (1, 2, 4, 4), True)
    """
    if (feature_q is None) != (feature_k is None):
        raise ValueError("linear_attention: feature_q and feature_k go together, got one of them")
    maps: tuple[Array | None, ...] = (None, None, None, None)
    settings = NO_MAP
    if feature_q is not None and feature_k is not None:
        settings = _shared_settings("linear_attention", feature_q, feature_k)
        maps = (*feature_q._parameters(), *feature_k._parameters())
    if state is not None and not (isinstance(state, tuple) and len(state) == 2):
        raise TypeError("linear_attention: state needs to be a tuple (kv, ksum)")
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

    q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, V], gate [H] before the sigmoid; cu_seqlens
    [N + 1] int32 or int64 where B = 1, or key_padding_mask [B, T] bool, true for tokens.

    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 50, 4), np.float32)
    >>> phi = Features(np.eye(4)[None].repeat(2, 0))
    >>> y = hybrid_attention(q, k, v, phi, phi, np.zeros(2, np.float32), window=8, sink=1)
    >>> y.shape, bool(np.allclose(y[:, :, 0], v[:, :, 0]))  # the first token sees itself alone
    ((1, 2, 50, 4), True)
    """
    settings = _shared_settings("hybrid_attention", feature_q, feature_k)
    return _C.hybrid_attention(
        *_inputs("hybrid_attention", q, k, v, feature_q, feature_k, gate),
        *(
            cu_seqlens,
            key_padding_mask,
            window,
            _window_code("hybrid_attention", window_kind),
            sink,
        ),
        *(_scale(scale, q), affine, *settings),
    )[0]


def hybrid_attention_step_(
    q: Array,
    k: Array,
    v: Array,
    feature_q: Features,
    feature_k: Features,
    gate: Array,
    state: HybridState,
    *,
    state_indices: Array | None = None,
    scale: float | None = None,
    affine: bool = False,
) -> Array:
    """Append T tokens per sequence to ``state``, in place, and return their outputs, SPEC 5.

    q [B, H, T, D], k [B, Hk, T, D], v [B, Hk, T, V]; state_indices [B] int32 or int64, the state of
    each sequence, None where there are B. After an error the state is as it was.

    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 1, 4), np.float32)
    >>> phi = Features(np.eye(4)[None].repeat(2, 0))
    >>> state = HybridState.empty_for(k, v, phi, window=8)
    >>> y = hybrid_attention_step_(q, k, v, phi, phi, np.zeros(2, np.float32), state)
    >>> y.shape, state.length
    ((1, 2, 1, 4), array([1]))
    """
    settings = _shared_settings("hybrid_attention_step_", feature_q, feature_k)
    if not isinstance(state, HybridState):
        raise TypeError(
            f"hybrid_attention_step_: state is of type {type(state).__name__}, needs a HybridState"
        )
    return _C.hybrid_attention_step_(
        *_inputs("hybrid_attention_step_", q, k, v, feature_q, feature_k, gate),
        *(*state.arrays.values(), state_indices, None, None),
        *(
            state.window,
            _window_code("hybrid_attention_step_", state.window_kind),
            _scale(scale, q),
            affine,
            *settings,
        ),
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
    """Softmax teacher and how far the hybrid student is from it, SPEC 7.

    Arguments as in :func:`hybrid_attention`; ``xent`` asks for the cross-entropy of the weights,
    too, which is 0 else.

    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 50, 4), np.float32)
    >>> phi = Features(np.eye(4)[None].repeat(2, 0))
    >>> result = attention_transfer(q, k, v, phi, phi, np.zeros(2, np.float32), window=8)
    >>> result.teacher.shape, result.mse > 0, result.xent
    ((1, 2, 50, 4), True, 0.0)
    """
    settings = _shared_settings("attention_transfer", feature_q, feature_k)
    teacher, mse, cross_entropy, *_ = _C.attention_transfer(
        *_inputs("attention_transfer", q, k, v, feature_q, feature_k, gate),
        *(
            cu_seqlens,
            key_padding_mask,
            xent,
            window,
            _window_code("attention_transfer", window_kind),
            sink,
        ),
        *(_scale(scale, q), affine, *settings),
    )
    return Transfer(teacher, float(mse), float(cross_entropy))


def _inputs(
    op: str, q: Array, k: Array, v: Array, feature_q: Features, feature_k: Features, gate: Array
) -> tuple[Array | None, ...]:
    _check_parameter(gate, f"{op}: gate")
    return q, k, v, *feature_q._parameters(), *feature_k._parameters(), _contiguous(gate)


def _check_parameter(x: Any, name: str) -> None:
    if not all(hasattr(x, part) for part in ("astype", "ndim", "flags")):  # JAX's have no flags
        hint = "; numpy.asarray makes one of it" if hasattr(x, "__array__") else ""
        kind = type(x)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        given = f"{module}{kind.__qualname__}"
        raise TypeError(f"{name} is of type {given}, needs an array of NumPy or CuPy{hint}")
    if hasattr(x, "mask"):
        raise TypeError(f"{name} is a masked array, needs one without mask")
    if not np.can_cast(x.dtype, np.float32, "same_kind"):
        raise TypeError(f"{name} has dtype {x.dtype}, needs real numbers")


def _check_map(features: Any, name: str) -> None:
    if not isinstance(features, Features):
        raise TypeError(f"{name} is of type {type(features).__name__}, needs {__name__}.Features")


def _contiguous(parameter: Array) -> Array:
    return parameter.astype(np.float32, order="C", copy=False)


def _shared_settings(op: str, q: Features, k: Features) -> tuple[int, bool, bool, float]:
    _check_map(q, f"{op}: feature_q")
    _check_map(k, f"{op}: feature_k")
    if q._settings() != k._settings():
        raise ValueError(
            f"{op}: feature_q and feature_k differ in activation, two_sided, skip or eps: "
            f"{q._settings()} and {k._settings()}"
        )
    return q._settings()


def _scale(scale: float | None, q: Array) -> float:
    if scale is not None:
        return scale
    width = (np.shape(q) or (0,))[-1]
    return width**-0.5 if width else 1.0  # the library refuses such a q


def _window_code(op: str, window_kind: str) -> int:
    return _code(window_kind, WINDOW_KINDS, f"{op}: window_kind")


def _code(name: str, names: tuple[str, ...], argument: str) -> int:
    if name not in names:
        raise ValueError(f"{argument} is {name!r}, needs one of {', '.join(names)}")
    return names.index(name)
