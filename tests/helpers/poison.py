"""Uninitialised memory that shows: what a kernel leaves unwritten must not look like a result."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_PERTURB = -6  # glibc: malloc fills new memory with the complement of this byte
HUGE = 0x80  # complement 0x7f: 3.4e38 in fp32 and bf16, nan in fp16


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds 3.4e38 (fp32, bf16) or nan (fp16), where the C library can do that; on a GPU
    nan.

    torch's own fill_uninitialized_memory does not reach CPU tensors allocated through its C ABI, as
    the CPU kernels do; on a GPU that comes to the same as an allocation in Python.
    """
    malloc, gpu = platform.libc_ver()[0] == "glibc", torch.cuda.is_available()
    if malloc:
        ctypes.CDLL(None).mallopt(M_PERTURB, HUGE)
    if gpu:
        torch.use_deterministic_algorithms(True, warn_only=True)  # only then it fills
    try:
        yield
    finally:
        if gpu:
            torch.use_deterministic_algorithms(False)
        if malloc:
            ctypes.CDLL(None).mallopt(M_PERTURB, 0)
