"""The sequential causal product, compiled from causal_product.c when it is first needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("causal_product.c")
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "causal_product.so")
    # The flags of fast-transformers' own build, on CPython's -O3.
    flags = ["-O3", "-fopenmp", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run([str(compiler()), *flags, str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.causal_product.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4
    folder.cleanup()
    return library


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SPEC 4 without maps, in fp32: the product, then the division by q . cumsum(k)."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, H, T, F = q.shape
    out = v.new_empty(B, H, T, v.shape[-1])
    pointers = (x.data_ptr() for x in (q, k, v, out))
    _library().causal_product(*pointers, B * H, T, F, v.shape[-1])
    return out / (torch.einsum("bhtf,bhtf->bht", q, k.cumsum(2)) + 1e-12)[..., None]
