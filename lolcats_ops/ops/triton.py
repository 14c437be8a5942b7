"""Registers the Triton kernels as torch.ops.lolcats_ops_triton.*, and for CUDA tensors as
torch.ops.lolcats_ops.*. Triton is imported by the first call, not here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from .._native import load_torch_ops

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
    return import_module("lolcats_ops.kernels.triton")


def _implementation(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return getattr(_kernels(), name)(*args)

    return call


def _register() -> list[torch.library.Library]:
    load_torch_ops()
    own = torch.library.Library(NAMESPACE, "DEF")
    native = torch.library.Library("lolcats_ops", "IMPL")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.lolcats_ops, name).default._schema)
        own.define(schema.removeprefix("lolcats_ops::"))
        for key in ("CPU", "CUDA"):
            own.impl(name, _implementation(name), key)
        native.impl(name, _implementation(name), "CUDA")
    return [own, native]


_libraries = _register()  # they unregister when they are collected
