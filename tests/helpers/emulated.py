"""The CUDA kernels on CPU tensors, run by the emulator (gpu_on_cpu.cuda)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from gpu_on_cpu.cuda.program import Program, build
from torch import Tensor

from lolcats_ops._codes import WINDOW_KINDS
from lolcats_ops.features import Features
from lolcats_ops.state import HybridState

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)


@cache
def program(name: str, sanitizer: str | None = None, instances: str | None = None) -> Program:
    """tests/cuda/<name>.cpp; ``instances``: a macro, for fewer kernels than there are."""
    defines = {"INSTANCES": instances} if instances else {}
    include = (ROOT, ROOT / "kernels" / "include")
    return build(
        ROOT / "tests" / "cuda" / f"{name}.cpp",
        sanitizer=sanitizer, include=include, defines=defines,
    )  # fmt: skip


def described(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | float]:
    """Tensors with their shapes and strides as numbers."""
    arguments: dict[str, Tensor | float] = {}
    for name, t in tensors.items():
        arguments[f"{name}.absent"] = t is None
        if t is None:
            continue
        arguments |= {name: t, f"{name}.dtype": DTYPES.index(t.dtype), f"{name}.ndim": t.ndim}
        for i in range(t.ndim):
            arguments |= {f"{name}.shape{i}": t.shape[i], f"{name}.stride{i}": t.stride(i)}
    return arguments


def activation(features: Features) -> dict[str, float]:
    return dict(zip(("activation", "two_sided", "skip", "eps"), features.codes, strict=True))


def hybrid_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    state: HybridState,
    *,
    cuts: list[int] | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    affine: bool = False,
    lazy: int = 0,
    run: Program | None = None,
    order: int = 0,
) -> Tensor:
    """The outputs of one call for all tokens, or of one call for those between successive cuts."""
    out = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
    cuts = cuts or [0, q.shape[2]]
    tensors = {"q": q, "k": k, "v": v, "o": out, "gate": gate, **state.tensors}
    for which, features in (("q", feature_q), ("k", feature_k)):
        tensors |= {f"weight_{which}": features.weight, f"bias_{which}": features.bias}
    tensors |= {"state_indices": state_indices, "cu_seqlens": cu_seqlens}
    tensors["cuts"] = torch.tensor(cuts)
    settings = {
        "window": state.window,
        "window_kind": WINDOW_KINDS.index(state.window_kind),
        "scale": q.shape[3] ** -0.5,
        "affine": affine,
        "lazy": lazy,
    }
    run = run or program("step")
    run(**described(tensors), **activation(feature_q), **settings, order=order)
    return out


def feature_map(x: Tensor, features: Features, *, run: Program | None = None) -> Tensor:
    y = torch.full((*x.shape[:3], features.out_features), float("nan"), dtype=x.dtype)
    tensors = {"x": x, "y": y, "weight_x": features.weight, "bias_x": features.bias}
    run = run or program("feature_map")
    run(**described(tensors), **activation(features))
    return y
