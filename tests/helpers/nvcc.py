"""Compiles the CUDA kernels with nvcc and asks ptxas what they need."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .emulated import ROOT

NVCC = shutil.which("nvcc")


def _source(kernel: str, params: str) -> str:
    file = kernel.removeprefix("lol::cuda::").split("<")[0]
    return (
        f'#include "{ROOT}/kernels/cuda/{file}.cuh"\n'
        f"template __global__ void {kernel}(const __grid_constant__ lol::cuda::{params});\n"
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@cache
def ptx(kernel: str, params: str, target: str) -> str:
    """The PTX of a kernel, a C++ name expression."""
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.cu"), Path(folder, "kernel.ptx")
        source.write_text(_source(kernel, params))
        _run("nvcc", "-std=c++17", f"-arch={target}", "-ptx", str(source), "-o", str(result))
        return result.read_text()


def resources(kernel: str, params: str, target: str) -> dict[str, int]:
    """Registers, bytes of spills, and of static shared memory, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text(_source(kernel, params))
        options = ("-std=c++17", f"-arch={target}", "-Xptxas", "-v", "-cubin")
        report = _run("nvcc", *options, str(source), "-o", str(Path(folder, "kernel.cubin")))
    registers, *_ = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    shared = re.findall(r"(\d+) bytes smem", report)
    return {
        "registers": int(registers),
        "spill_bytes": sum(map(int, spills)),
        "static_shared_bytes": sum(map(int, shared)),
    }
