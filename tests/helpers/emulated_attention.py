"""hybrid_attention and linear_attention of the CUDA kernels, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from lolcats_ops._codes import WINDOW_KINDS
from lolcats_ops.features import Features
from lolcats_ops.state import HybridState

from . import emulated
from .emulated import activation, described

# What a program has of the kernels, so that few are compiled.
ONE = "X(lol::bf16, 64, 64, 2, 64, 64, 1)"
ONE_FP32 = "X(float, 64, 64, 2, 32, 64, 2)"
ONE_LARGE = "X(lol::bf16, 128, 128, 2, 32, 64, 1)"
ONE_FP16 = "X(lol::f16, 64, 64, 2, 32, 64, 2)"
NARROW = f"{ONE} {ONE_FP32} {ONE_FP16}"
ONE_WIDE = "X(lol::bf16, 128, 64, 2, 128, 64, 2)"
WIDE = (
    f"{ONE_WIDE} X(lol::bf16, 96, 64, 2, 96, 64, 2) X(lol::bf16, 64, 128, 1, 64, 64, 1) "
    "X(float, 96, 64, 2, 48, 32, 2) X(lol::f16, 96, 64, 2, 48, 32, 2)"
)
LARGE = f"{ONE_LARGE} X(lol::bf16, 256, 64, 2, 96, 32, 1)"
LARGEST = (
    "X(float, 128, 64, 2, 32, 32, 2) X(float, 256, 256, 2, 16, 16, 1) "
    "X(lol::bf16, 256, 256, 2, 16, 32, 2) "
    "X(lol::f16, 128, 64, 2, 32, 32, 2) X(lol::f16, 256, 256, 2, 16, 16, 1)"
)
SMALLEST = (
    "X(lol::bf16, 96, 64, 2, 96, 32, 1) X(lol::bf16, 128, 64, 2, 64, 32, 2) "
    "X(lol::bf16, 256, 256, 2, 16, 16, 1) X(float, 64, 64, 2, 32, 32, 1) "
    "X(lol::f16, 64, 64, 2, 32, 32, 1)"
)
SM_80, SM_86 = 163 * 1024, 99 * 1024  # bytes of shared memory that a block may have


def program(
    instances: str, sanitizer: str | None = None, order: int = 0, most_shared_bytes: int = SM_80
) -> Callable[..., None]:
    """What runs the kernels, for ``Kernels``."""
    run = emulated.program("attention", instances, sanitizer)
    return partial(run, order=order, most_shared_bytes=most_shared_bytes)


class Kernels:
    """The public functions, as the tests of operators call them.

    ``run`` gets the arguments as tests/cuda/attention_arguments.h has them. ``saved`` has what the
    last call left for a backward pass, by name.
    """

    def __init__(self, run: Callable[..., None]):
        self.run = run
        self.saved = SimpleNamespace()

    def hybrid_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_q: Features,
        feature_k: Features,
        gate: Tensor,
        *,
        window: int,
        window_kind: str = "sliding",
        sink: int = 0,
        affine: bool = False,
        **sequences: Tensor,
    ) -> Tensor:
        m = torch.full(q.shape[:3], float("nan"))
        settings = {"window": window, "window_kind": WINDOW_KINDS.index(window_kind), "sink": sink}
        settings |= {"affine": affine, "scale": q.shape[3] ** -0.5}
        out = self._call(q, k, v, feature_q, feature_k, {"gate": gate, "m": m}, settings, sequences)
        self.saved.m = m
        return out

    def linear_attention(
        self,
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
        return_state: bool = True,
        **sequences: Tensor,
    ) -> tuple[Tensor, SimpleNamespace]:
        cu_seqlens = sequences.get("cu_seqlens")
        count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        heads, width = k.shape[1], q.shape[3]
        if feature_k is not None:
            heads, width = feature_k.heads, feature_k.out_features
        kv = torch.full((count, heads, width, v.shape[3]), float("nan"))
        tensors = {
            "gate": None,
            "kv0": None if state is None else state.kv,
            "ksum0": None if state is None else state.ksum,
            "kv": kv,
            "ksum": kv[..., 0].clone(),
        }
        settings = {"scale": scale, "normalize": normalize, "den_eps": eps}
        out = self._call(q, k, v, feature_q, feature_k, tensors, settings, sequences)
        return out, SimpleNamespace(kv=kv, ksum=tensors["ksum"])

    def _call(self, q, k, v, feature_q, feature_k, tensors, settings, sequences) -> Tensor:
        out = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
        self.saved = SimpleNamespace(den=torch.full(q.shape[:3], float("nan")))
        tensors = {"q": q, "k": k, "v": v, "o": out, "den": self.saved.den, **tensors}
        for which, features in (("q", feature_q), ("k", feature_k)):
            tensors[f"weight_{which}"] = None if features is None else features.weight
            tensors[f"bias_{which}"] = None if features is None else features.bias
        for name in ("cu_seqlens", "key_padding_mask"):
            tensors[name] = sequences.get(name)
        codes = dict.fromkeys(("activation", "two_sided", "skip", "eps"), 0)
        if feature_q is not None:
            codes = activation(feature_q)
        detached = {n: None if t is None else t.detach() for n, t in tensors.items()}
        self.run(**described(detached), **codes, **settings)
        return out
