"""Registers torch.ops.lolcats_ops.* for CUDA tensors: the kernels that ``dispatch`` finds best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._codes import ACTIVATIONS, WINDOW_KINDS
from ..case import Case
from ..dispatch import OPS, chosen
from . import triton

NAMESPACE = "lolcats_ops"


def _name(op: str, argument: str, code: int, names: tuple[str, ...]) -> str:
    if not 0 <= code < len(names):
        raise ValueError(f"{op}: {argument} is {code}, needs 0 to {len(names) - 1}")
    return names[code]


def _case(op: str, arguments: dict[str, Any]) -> Case:
    """The case of a call, from its arguments by the names of the schema."""
    q: Tensor = arguments["q"] if "q" in arguments else arguments["x"]
    v: Tensor = arguments.get("v", q)
    weight: Tensor | None = arguments.get("weight_k", arguments.get("weight"))
    sinks = arguments["k_sink"].shape[2] if "k_sink" in arguments else arguments.get("sink", 0)
    return Case(
        op,
        q.device,
        q.dtype,
        q.shape[3],
        v.shape[3],
        0 if weight is None else weight.shape[2],
        _name(op, "activation", arguments["activation"], ACTIVATIONS),
        arguments["two_sided"],
        q.shape[2],
        arguments.get("window", 0),
        _name(op, "window_kind", arguments.get("window_kind", 0), WINDOW_KINDS),
        sinks,
        arguments.get("key_padding_mask") is not None,
    )


def _implementation(name: str) -> Callable[..., Any]:
    by_triton = triton.implementation(name)
    if name not in OPS:  # a gradient
        return by_triton
    by_cuda = getattr(torch.ops.lolcats_ops_cuda, name).default
    names = [a.name for a in by_cuda._schema.arguments]

    def call(*args: Any) -> Any:
        backend = chosen(_case(name, dict(zip(names, args, strict=True))))
        return (by_cuda if backend == "cuda" else by_triton)(*args)

    return call


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "IMPL")
    for name in triton.OPERATORS:
        library.impl(name, _implementation(name), "CUDA")
    return library


_library = _register()  # it unregisters when it is collected
