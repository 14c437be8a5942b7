"""The operators as modules that own their parameters; projections and RoPE stay with the caller."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._sizes import check_size
from .features import Features, check_init, init_weight
from .ops.validation import check_flags, check_window
from .state import HybridState


class Fp32Module(nn.Module):
    """A module whose own parameters stay fp32 in a model of 16 bits: in bf16 a gate or a map does
    not move by the steps that it is trained with.

    >>> FeatureMap(4, 16).to(torch.bfloat16).weight.dtype
    torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp32Module:
        def apply(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device) if y.is_floating_point() and y.dtype.itemsize < 4 else y

        return super()._apply(apply, recurse)


class FeatureMap(Fp32Module):
    """A learned feature map phi, one per head (SPEC 1). Parameters are fp32.

    Args:
        heads, head_dim: Hf and D.
        width: f; None for D.
        bias: with a bias, zero at the start.
        init: see ``lolcats_ops.features.init_weight``. favor, which is not trained, needs
            "orthogonal".

    Raises:
        TypeError, ValueError: arguments that do not fit together.

    >>> phi = FeatureMap(4, 16)
    >>> phi(torch.randn(1, 4, 10, 16)).shape
    torch.Size([1, 4, 10, 32])
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        width: int | None = None,
        *,
        activation: str = "softmax",
        two_sided: bool = True,
        bias: bool = False,
        skip: bool = False,
        init: str = "identity",
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        check_init("FeatureMap", activation, init)
        width = head_dim if width is None else width
        # The projection of Performer is random and stays so.
        self.weight = nn.Parameter(init_weight(heads, head_dim, width, init), activation != "favor")
        self.bias = nn.Parameter(torch.zeros(heads, width, dtype=torch.float32)) if bias else None
        self.settings: dict[str, Any] = {
            "activation": activation,
            "two_sided": two_sided,
            "skip": skip,
            "eps": eps,
        }
        _ = self.features  # which checks all of this

    @property
    def features(self) -> Features:
        """The map as the operators take it."""
        return Features(self.weight, self.bias, **self.settings)

    def forward(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """x [B, H, T, D] -> [B, H, T, F]."""
        return ops.feature_map(x, self.features, backend=backend)

    def extra_repr(self) -> str:
        heads, head_dim, width = self.weight.shape
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{heads}, {head_dim}, {width}, {settings}"


class LinearAttention(Fp32Module):
    """Causal linear attention with learned feature maps (SPEC 4).

    Args:
        heads, kv_heads, head_dim: H, Hk and D.
        share_kv_features: k's map per key/value head, which makes the state H / Hk times smaller.
        features: arguments of ``FeatureMap``.

    The maps' parameters go into the operator: hooks of ``feature_q`` and ``feature_k``, such as
    those of ``torch.nn.utils.spectral_norm``, do not run; ``torch.nn.utils.parametrizations`` work.

    Raises:
        TypeError, ValueError: arguments that do not fit together.

    >>> attention = LinearAttention(4, 2, 16)
    >>> q, k, v = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
    >>> attention(q, k, v).shape
    torch.Size([1, 4, 10, 16])
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        share_kv_features: bool = False,
        **features: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_size(name, "heads", heads, 1)
        check_size(name, "kv_heads", kv_heads, 1)
        if heads % kv_heads:
            raise ValueError(f"{name}: heads is {heads}, needs a multiple of kv_heads, {kv_heads}")
        self.feature_q = FeatureMap(heads, head_dim, **features)
        self.feature_k = FeatureMap(kv_heads if share_kv_features else heads, head_dim, **features)
        if features.get("activation") == "favor":  # an estimate of exp(q . k), by one projection
            self.feature_q.weight.copy_(
                self.feature_k.weight.repeat_interleave(heads // self.feature_k.weight.shape[0], 0)
            )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, HybridState]:
        """``lolcats_ops.linear_attention`` with these maps; ``options`` are its own."""
        maps: dict[str, Any] = {
            "feature_q": self.feature_q.features,
            "feature_k": self.feature_k.features,
        }
        return ops.linear_attention(q, k, v, **maps, **options)


class HybridAttention(LinearAttention):
    """Softmax over a window and learned features beyond it (SPEC 3).

    Args:
        heads, kv_heads, head_dim, share_kv_features, features: as in ``LinearAttention``.
        window, window_kind, sink, affine: as in ``lolcats_ops.hybrid_attention``.
        gate_init: raw gate at the start; the softmax part is weighted by its sigmoid.

    Raises:
        TypeError, ValueError: arguments that do not fit together.

    >>> attention = HybridAttention(4, 2, 16, window=8, sink=1)
    >>> q, k, v = torch.randn(1, 4, 10, 16), torch.randn(1, 2, 10, 16), torch.randn(1, 2, 10, 16)
    >>> attention.transfer(q, k, v).mse.backward()  # stage 1
    >>> state = attention.empty_state(batch=1)
    >>> attention.step_(q, k, v, state).shape, state.length
    (torch.Size([1, 4, 10, 16]), tensor([10]))
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int = 64,
        window_kind: str = "sliding",
        sink: int = 0,
        affine: bool = False,
        gate_init: float = 0.1,
        share_kv_features: bool = False,
        **features: Any,
    ) -> None:
        super().__init__(heads, kv_heads, head_dim, share_kv_features=share_kv_features, **features)
        check_window("HybridAttention", window, window_kind, sink)
        check_flags("HybridAttention", affine=affine)
        is_number = isinstance(gate_init, Real) and not isinstance(gate_init, bool)
        if not is_number:
            raise TypeError(f"HybridAttention: gate_init is {gate_init!r}, needs a number")
        if not math.isfinite(gate_init):
            raise ValueError(f"HybridAttention: gate_init is {gate_init}, needs to be finite")
        self.kv_heads = kv_heads
        self.gate = nn.Parameter(torch.full((heads,), gate_init, dtype=torch.float32))
        self.affine = affine
        self.windows: dict[str, Any] = {
            "window": window,
            "window_kind": window_kind,
            "sink": sink,
        }

    def _parameters_of_op(self) -> tuple[Features, Features, Tensor]:
        return self.feature_q.features, self.feature_k.features, self.gate

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, **options: Any
    ) -> Tensor | tuple[Tensor, HybridState]:
        """``lolcats_ops.hybrid_attention`` with these parameters; ``options`` are its own."""
        settings = {**self.windows, "affine": self.affine, **options}
        return ops.hybrid_attention(q, k, v, *self._parameters_of_op(), **settings)

    def transfer(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> ops.Transfer:
        """``lolcats_ops.attention_transfer`` with these parameters: the losses of stage 1."""
        settings = {**self.windows, "affine": self.affine, **options}
        return ops.attention_transfer(q, k, v, *self._parameters_of_op(), **settings)

    @torch.no_grad()
    def step_(self, q: Tensor, k: Tensor, v: Tensor, state: HybridState, **options: Any) -> Tensor:
        """``lolcats_ops.hybrid_attention_step_`` with these parameters, without gradients."""
        parameters = self._parameters_of_op()
        settings = {"affine": self.affine, **options}
        return ops.hybrid_attention_step_(q, k, v, *parameters, state, **settings)

    def empty_state(
        self,
        batch: int,
        *,
        value_dim: int | None = None,
        slack: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> HybridState:
        """The state before the first token; ``value_dim`` is V, None for D."""
        phi = self.feature_k.features
        return HybridState.empty(
            batch,
            phi.heads,
            self.kv_heads,
            phi.head_dim,
            phi.head_dim if value_dim is None else value_dim,
            phi.out_features,
            **self.windows,
            slack=slack,
            dtype=dtype,
            device=self.gate.device,
        )
