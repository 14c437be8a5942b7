"""Kernels for linearized attention, and helpers that convert a pretrained LLM to it.

Importing this package needs NumPy alone; the names below load PyTorch when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._native import get_cmake_dir, get_include, get_library

if TYPE_CHECKING:
    from . import convert, hf, nn, numpy, reference
    from .backends import backend_for, backends, warmup
    from .ops import (
        Features,
        attention_transfer,
        feature_map,
        hybrid_attention,
        hybrid_attention_step_,
        linear_attention,
    )
    from .state import HybridState

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(("reference", "nn", "hf", "convert", "numpy"), ""),
    **dict.fromkeys(("backend_for", "backends", "warmup"), "backends"),
    "HybridState": "state",
    **dict.fromkeys(
        (
            "Features",
            "attention_transfer",
            "feature_map",
            "hybrid_attention",
            "hybrid_attention_step_",
            "linear_attention",
        ),
        "ops",
    ),
}
_NEEDS = {"hf": ("transformers", "hf"), "convert": ("transformers", "hf"), "numpy": ("numpy", "")}

__all__ = [
    "Features",
    "HybridState",
    "attention_transfer",
    "backend_for",
    "backends",
    "convert",
    "feature_map",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "hf",
    "hybrid_attention",
    "hybrid_attention_step_",
    "linear_attention",
    "nn",
    "numpy",
    "reference",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, extra = _NEEDS.get(name, ("torch", "torch"))
    if find_spec(package) is None:
        raise ImportError(
            f"lolcats_ops.{name} needs {package}, which is not installed: "
            f"pip install 'lolcats_ops[{extra}]'"
        )
    if not _LAZY[name]:
        return import_module(f".{name}", __name__)
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
