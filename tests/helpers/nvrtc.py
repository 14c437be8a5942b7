"""Compiles the CUDA kernels with NVRTC, of the package nvidia-cuda-nvrtc: no GPU, no CUDA toolkit.

    PYTHONPATH=tests python -m helpers.nvrtc sm_80 sm_90 sm_100

compiles every instance for these targets and prints what it needs.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from lolcats_ops import _cuda_sources

from . import ptxas


class CompileError(Exception):
    """Its text is NVRTC's log."""


class Compiled(NamedTuple):
    ptx: str
    cubin: bytes  # nothing for a virtual architecture, such as compute_80
    log: str


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC, or None if the package is not installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = {p.name.partition(".so")[0]: str(p.locate()) for p in files if ".so" in p.name}
    ctypes.CDLL(found["libnvrtc-builtins"])  # NVRTC loads it by name, which then finds this one
    return ctypes.CDLL(found["libnvrtc"])


def build(code: str, options: Sequence[str], kernel: str) -> Compiled:
    """Compiles a translation unit for one kernel, a C++ name expression."""
    program = ctypes.c_void_p()
    _call("CreateProgram", ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None)
    try:
        _call("AddNameExpression", program, kernel.encode())
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library().nvrtcCompileProgram(program, len(options), texts)
        log = _text(program, "ProgramLog")
        if failed:
            raise CompileError(log)
        return Compiled(_text(program, "PTX"), _bytes(program, "CUBIN"), log)
    finally:
        _call("DestroyProgram", ctypes.byref(program))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"Get{what}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    if size.value:
        _call(f"Get{what}", program, buffer)
    return buffer.raw


def _text(program: ctypes.c_void_p, what: str) -> str:
    return _bytes(program, what).rstrip(b"\0").decode()


def _call(function: str, *arguments: object) -> None:
    status = getattr(library(), f"nvrtc{function}")(*arguments)
    assert status == 0, f"nvrtc{function} returned {status}"


@cache
def ptx(kernel: str, target: str) -> str:
    """The PTX of a kernel, for a target such as sm_80."""
    options = (*_cuda_sources.options(), f"-arch={target.replace('sm', 'compute')}")
    return build(_cuda_sources.unit(kernel), options, kernel).ptx


def resources(kernel: str, target: str) -> dict[str, int]:
    """What a kernel needs of a target."""
    options = (*_cuda_sources.options(), f"-arch={target}", "--ptxas-options=-v")
    return ptxas.resources(build(_cuda_sources.unit(kernel), options, kernel).log)


def instances() -> list[str]:
    """The name expressions of all kernels, as the headers list them."""
    headers = ("instances.h", "attention_instances.h")
    lists = {
        "LOL_FEATURE_MAP_INSTANCES": ("feature_map",),
        "LOL_STEP_INSTANCES": ("hybrid_attention_step",),
        "LOL_ATTENTION_INSTANCES": ("hybrid_attention", "linear_attention"),
    }
    code = [f'#include "{header}"' for header in headers]
    code += ["#define X(...) <__VA_ARGS__>", *(f"{name} {name}(X)" for name in lists)]
    command = ("g++", "-E", "-P", f"-I{_cuda_sources.folder()}", "-x", "c++", "-")
    done = subprocess.run(
        command, input="\n".join(code), capture_output=True, text=True, check=True
    )
    return [
        f"lol::cuda::{operator}{arguments}"
        for name, instances in re.findall(r"^(LOL_\w+) (.*)$", done.stdout, re.MULTILINE)
        for operator in lists[name]
        for arguments in re.findall(r"<.*?>", instances)
    ]


def main(targets: Sequence[str]) -> None:
    for kernel in instances():
        for target in targets:
            print(f"{kernel} {target}: {resources(kernel, target)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["sm_80", "sm_90", "sm_100"])
