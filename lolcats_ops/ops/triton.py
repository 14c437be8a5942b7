"""Registers the Triton kernels as torch.ops.lolcats_ops_triton.*. Triton is imported by the first
call, not here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from .._libraries import load_torch_ops
from ..dispatch import why_no_triton

NAMESPACE = "lolcats_ops_triton"
OPERATORS = (
    "feature_map",
    "feature_map_backward",
    "linear_attention",
    "linear_attention_backward",
    "hybrid_attention",
    "hybrid_attention_backward",
    "hybrid_attention_step_",
    "attention_transfer",
    "attention_transfer_backward",
)


@cache
def _kernels() -> ModuleType:
    """Raises RuntimeError: they cannot be compiled, as gradients of CUDA C++ kernels find late."""
    if reason := why_no_triton():
        raise RuntimeError(f"lolcats_ops: Triton's kernels, of all gradients on a GPU: {reason}")
    return import_module("lolcats_ops.kernels.triton")


def implementation(name: str) -> Callable[..., Any]:
    """The operator ``name`` on arguments in the order of its schema."""

    def call(*args: Any) -> Any:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return getattr(_kernels(), name)(*args)

    return call


def _register() -> torch.library.Library:
    load_torch_ops()
    library = torch.library.Library(NAMESPACE, "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.lolcats_ops, name).default._schema)
        library.define(schema.removeprefix("lolcats_ops::"))
        for key in ("CPU", "CUDA"):
            library.impl(name, implementation(name), key)
    return library


_library = _register()  # it unregisters when it is collected
