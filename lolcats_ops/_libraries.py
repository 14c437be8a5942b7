"""Where the compiled parts of the installed package are, and how torch gets its operators."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path


def _root() -> Path:
    # CMake installs beside _C, which an editable install keeps apart from the Python sources.
    from . import _C

    return Path(_C.__file__).resolve().parent


def _library(name: str) -> str:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return str(_root() / "lib" / f"lib{name}.{suffix}")


def get_include() -> str:
    """Directory to compile against: it holds ``lolcats_ops/lolcats_ops.h``.

    >>> (Path(get_include()) / "lolcats_ops" / "lolcats_ops.h").is_file()
    True
    """
    return str(_root() / "include")


def get_library() -> str:
    """Path of the C library with the kernels, to link or ``dlopen``.

    >>> library = ctypes.CDLL(get_library())
    >>> callable(library.lol_hybrid_attention)
    True
    """
    return _library("lolcats_ops")


def get_cmake_dir() -> str:
    """Value of ``lolcats_ops_DIR`` (or ``CMAKE_PREFIX_PATH``) for CMake's ``find_package``; on the
    command line ``python -m lolcats_ops --cmakedir``.

    >>> sorted(path.name for path in Path(get_cmake_dir()).glob("*Config.cmake"))
    ['lolcats_opsConfig.cmake']
    """
    return str(_root() / "cmake")


def get_torch_library() -> str:
    """Path of the library that registers ``torch.ops.lolcats_ops``: C++ programs that run an
    AOTInductor package ``dlopen`` it after libtorch.

    >>> Path(get_torch_library()).is_file()
    True
    """
    return _library("lolcats_ops_torch")


@cache
def load_torch_ops() -> None:
    """Register ``torch.ops.lolcats_ops.*``.

    Raises:
        ImportError: this torch has no stable C ABI (older than 2.10).
    """
    import torch

    path = get_torch_library()
    torch.ops.load_library(path)
    registration_error = ctypes.CDLL(path).lolcats_ops_torch_error
    registration_error.restype = ctypes.c_char_p
    if reason := registration_error():
        raise ImportError(f"torch {torch.__version__} cannot load lolcats_ops: {reason.decode()}")
