"""Kernels for linearized attention, and helpers that convert a pretrained LLM to it.

Importing this package needs NumPy alone; the names below load PyTorch when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._libraries import get_cmake_dir, get_include, get_library, get_torch_library

if TYPE_CHECKING:
    from . import convert, hf, nn, numpy, reference
    from . import cupy as cupy
    from .dispatch import backend_for, backends
    from .features import Features, init_weight
    from .ops.attention_transfer import attention_transfer
    from .ops.feature_map import feature_map
    from .ops.hybrid_attention import hybrid_attention
    from .ops.hybrid_attention_step import hybrid_attention_step_
    from .ops.linear_attention import linear_attention
    from .ops.warmup import warmup
    from .reference import Transfer
    from .state import HybridState

__version__ = "0.1.0"

__all__ = [
    "Features",
    "HybridState",
    "Transfer",
    "attention_transfer",
    "backend_for",
    "backends",
    "convert",
    "feature_map",
    "get_cmake_dir",
    "get_include",
    "get_library",
    "get_torch_library",
    "hf",
    "hybrid_attention",
    "hybrid_attention_step_",
    "init_weight",
    "linear_attention",
    "nn",
    "numpy",
    "reference",
    "warmup",
]


# The module of each lazy name; the other lazy names are modules themselves.
_MODULE = {
    "Features": "features",
    "HybridState": "state",
    "Transfer": "reference",
    "attention_transfer": "ops",
    "backend_for": "dispatch",
    "backends": "dispatch",
    "feature_map": "ops",
    "hybrid_attention": "ops",
    "hybrid_attention_step_": "ops",
    "init_weight": "features",
    "linear_attention": "ops",
    "warmup": "ops",
}
# What a lazy name needs beyond NumPy; torch unless it is listed here.
_NEEDS = {
    "numpy": (),
    "cupy": (),
    "convert": ("torch", "transformers"),
    "hf": ("torch", "transformers"),
}


def _load(name: str) -> Any:
    if name not in (*__all__, "cupy"):  # not in __all__, or import * would need CuPy
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    missing = [package for package in _NEEDS.get(name, ("torch",)) if find_spec(package) is None]
    if missing:
        extra = "hf" if "transformers" in missing else "torch"
        raise ImportError(
            f"lolcats_ops.{name} needs {' and '.join(missing)}: pip install 'lolcats_ops[{extra}]'"
        )
    if find_spec(f"{__name__}._C") is None:
        raise ImportError(
            f"lolcats_ops.{name}: {__path__[0]} is the source, without the compiled library. "
            "Leave its folder, where Python finds it before the installed package, or install it "
            "for development: pip install --editable ."
        )
    module = import_module(f".{_MODULE.get(name, name)}", __name__)
    value = getattr(module, name) if name in _MODULE else module
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # type checkers see the imports above, and that nothing else is there
    __getattr__ = _load


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
