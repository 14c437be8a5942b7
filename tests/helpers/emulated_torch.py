"""The CUDA kernels behind torch's operators, with the tensors in the memory of the CPU: arguments,
results, devices and streams go the way they go on a GPU, and the emulator runs the launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from gpu_on_cpu.cuda.program import build_library
from gpu_on_cpu.cuda.tensors import cuda_tensors, relabelled
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lolcats_ops as lo
from lolcats_ops.ops.triton import OPERATORS

from . import emulated, emulated_attention

INSTANCES = {
    "FEATURE_MAPS(X)": emulated.FEATURE_MAPS,
    "STEPS(X)": emulated.SMALL,
    "ATTENTIONS(X)": emulated_attention.ONE,
}


class Launch(ctypes.Structure):
    """lol_cuda_launch."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("params", ctypes.c_void_p),
        ("params_size", ctypes.c_size_t),
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


@cache
def _emulator() -> Any:
    include = (emulated.ROOT, emulated.ROOT / "kernels" / "include")
    source = emulated.ROOT / "tests" / "cuda" / "launcher.cpp"
    return ctypes.CDLL(str(build_library(source, include=include, defines=INSTANCES))).launch


def only_notes() -> Any:
    """A launcher that launches nothing."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch), ctypes.POINTER(Launch))
    def launch(launched, last) -> int:
        last[0] = launched[0]
        return 0

    return launch


@contextmanager
def launcher(launch: Any = None) -> Iterator[Launch]:
    """CUDA tensors and their kernels; yields the last launch. ``launch``: None for the emulator."""
    last, library = Launch(), ctypes.CDLL(lo.get_library())
    launch = launch or _emulator()
    with cuda_tensors():
        library.lol_set_cuda_launcher(launch, ctypes.byref(last))
        try:
            yield last
        finally:
            library.lol_set_cuda_launcher(None, None)


def on_cuda(x: Any, index: int = 0) -> Any:
    """Tensors, in whatever they are, as tensors of a CUDA device."""
    return tree_map_only(Tensor, lambda t: relabelled(t, f"cuda:{index}"), x)


def on_cpu(x: Any) -> Any:
    """And back."""
    return tree_map_only(Tensor, lambda t: relabelled(t, "cpu"), x)


@contextmanager
def on_cpu_tensors(namespace: str = "lolcats_ops_cuda") -> Iterator[None]:
    """torch.ops.lolcats_ops_cuda on CPU tensors: what ``namespace`` does with CUDA tensors in the
    same memory."""
    with torch.library._scoped_library("lolcats_ops_cuda", "IMPL") as library:
        for name in OPERATORS:
            operator = getattr(getattr(torch.ops, namespace), name).default
            library.impl(name, _relabelling(operator), "CPU")
        yield


def _relabelling(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: on_cpu(operator(*on_cuda(args)))
