"""The CUDA kernels on CPU tensors, run by the emulator (gpu_on_cpu.cuda)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_on_cpu.cuda.program import Program, build
from gpu_on_cpu.ptx import PtxKernel, Struct
from gpu_on_cpu.ptx.report import Report
from torch import Tensor

from lolcats_ops._codes import WINDOW_KINDS
from lolcats_ops.features import Features
from lolcats_ops.state import HybridState

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)

INPUTS = ("q", "k", "v", "o", "weight_q", "weight_k", "gate")  # of every attention

# What a program has of the kernels, so that few are compiled: those of small heads, those of larger
# ones, those of rows that are no multiples of 16 bytes.
SMALL = " ".join(
    f"X({number}, {shape}, true)"
    for number in ("float", "lol::bf16", "lol::f16")
    for shape in ("16, 16, 1", "16, 8, 4")
)
LARGE = " ".join(
    f"X(lol::bf16, {shape}, true)" for shape in ("32, 16, 1", "16, 32, 1", "32, 8, 4", "16, 16, 4")
)
UNALIGNED = "X(float, 16, 32, 4, false) X(lol::bf16, 16, 32, 4, false)"
ONE = "X(float, 16, 16, 1, true) X(float, 16, 8, 4, true)"
FEATURE_MAPS = " ".join(
    f"X({number}, {wide})"
    for number in ("float", "lol::bf16", "lol::f16")
    for wide in ("true", "false")
)


@cache
def program(name: str, instances: str, sanitizer: str | None = None) -> Program:
    """tests/cuda/<name>.cpp with some instances of its kernel."""
    return build(
        ROOT / "tests" / "cuda" / f"{name}.cpp",
        sanitizer=sanitizer,
        include=(ROOT, ROOT / "kernels" / "include"),
        defines={"INSTANCES(X)": instances},
    )


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


def step_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    state: HybridState,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """What hybrid_attention_step_ reads and writes, by name."""
    tensors = {"q": q, "k": k, "v": v, "o": o, "gate": gate, **state.tensors}
    for which, features in (("q", feature_q), ("k", feature_k)):
        tensors |= {f"weight_{which}": features.weight, f"bias_{which}": features.bias}
    sequences = {"cu_seqlens": cu_seqlens, "key_padding_mask": key_padding_mask}
    return {**tensors, "state_indices": state_indices, **sequences}


def step_settings(
    q: Tensor, features: Features, state: HybridState, affine: bool = False, lazy: int = 0
) -> dict[str, float]:
    """The numbers that it takes besides."""
    return {
        **activation(features),
        "window": state.window,
        "window_kind": WINDOW_KINDS.index(state.window_kind),
        "scale": q.shape[3] ** -0.5,
        "affine": affine,
        "lazy": lazy,
    }


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
    key_padding_mask: Tensor | None = None,
    affine: bool = False,
    lazy: int = 0,
    instances: str = SMALL,
    sanitizer: str | None = None,
    order: int = 0,
) -> Tensor:
    """The outputs of one call for all tokens, or of one call for those between successive cuts."""
    out = torch.full((*q.shape[:3], v.shape[3]), float("nan"), dtype=q.dtype)
    cuts = cuts or [0, q.shape[2]]
    inputs = (q, k, v, out, feature_q, feature_k, gate, state)
    tensors = step_tensors(*inputs, state_indices, cu_seqlens, key_padding_mask)
    tensors["cuts"] = torch.tensor(cuts)
    run = program("step", instances, sanitizer)
    run(**described(tensors), **step_settings(q, feature_q, state, affine, lazy), order=order)
    return out


def feature_map(x: Tensor, features: Features, sanitizer: str | None = None) -> Tensor:
    y = torch.full((*x.shape[:3], features.out_features), float("nan"), dtype=x.dtype)
    tensors = {"x": x, "y": y, "weight_x": features.weight, "bias_x": features.bias}
    run = program("feature_map", FEATURE_MAPS, sanitizer)
    run(**described(tensors), **activation(features))
    return y


@dataclass(frozen=True)
class Launch:
    """What the plan of a call hands to a launcher."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    params: bytes
    where: dict[int, str]  # the names of tensors, by where their addresses are in the params

    @property
    def warps(self) -> int:
        return self.blocks * self.threads // 32

    def run(self, ptx: str, tensors: Mapping[str, Any]) -> Report:
        """Runs the kernel's PTX on the CPU, which reports races and accesses out of bounds."""
        struct = Struct(self.params, {at: tensors[name] for at, name in self.where.items()})
        sizes = {"shared_bytes": self.shared_bytes, "threads": self.threads}
        return PtxKernel(ptx)((self.blocks,), [struct], **sizes)

    def traffic(self, report: Report) -> dict[str, Any]:
        """The bytes that a run moved, by the tensors' names."""
        return {name: report.global_bytes[1 + i] for i, name in enumerate(self.where.values())}


def planned(
    operator: str, names: tuple[str, ...], arguments: Mapping[str, Tensor | float]
) -> Launch:
    """The launch of a call, whose tensors have ``names``, in the order of
    tests/cuda/plan_<operator>.cpp."""
    results = {
        "launch": torch.zeros(4, dtype=torch.int64),
        "params": torch.zeros(1024, dtype=torch.uint8),
        "kernel": torch.zeros(256, dtype=torch.uint8),
        "addresses": torch.zeros(len(names), dtype=torch.int64),
    }
    program(f"plan_{operator}", "")(**arguments, **results)
    blocks, threads, shared, size = results["launch"].tolist()
    data = bytes(results["params"][:size].tolist())
    where = dict(zip(results["addresses"].tolist(), names, strict=True))
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, size, 8)]
    pointers = {8 * i: where[word] for i, word in enumerate(words) if word in where}
    kernel = bytes(results["kernel"].tolist()).split(b"\0")[0].decode()
    return Launch(kernel, blocks, threads, shared, data, pointers)
