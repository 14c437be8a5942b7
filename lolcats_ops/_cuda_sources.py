"""The CUDA C++ sources that a runtime compiler makes kernels of."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path


def folder() -> Path:
    """Where they are; they include each other and nothing else."""
    return Path(str(files("lolcats_ops.kernels"))) / "cuda"


def options() -> tuple[str, ...]:
    """What NVRTC has to be told, for any kernel."""
    # Sizes of tiles are constexpr functions that the host has, too: they name no side.
    return ("-std=c++17", "-default-device", f"-I{folder()}")


def unit(kernel: str) -> str:
    """The text to compile for a kernel, a C++ name expression.

    >>> unit("lol::cuda::feature_map<float, true>").splitlines()[1]
    '#include "feature_map.cuh"'
    """
    operator = kernel.removeprefix("lol::cuda::").partition("<")[0]
    # By this text alone CuPy finds a binary again: what is included has to show in it.
    return f'// {_digest()}\n#include "{operator}.cuh"\n'


@cache
def _digest() -> str:
    sources = sorted(path for path in folder().iterdir() if path.suffix in (".cuh", ".h"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
