"""Compiles the CUDA kernels with nvcc, where a CUDA toolkit is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from lolcats_ops import _cuda_sources

from . import ptxas

NVCC = shutil.which("nvcc")


def resources(kernel: str, target: str) -> dict[str, int]:
    """What a kernel, a C++ name expression, needs of a target such as sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text(f"{_cuda_sources.unit(kernel)}const auto instance = &{kernel};\n")
        options = ("-std=c++17", f"-I{_cuda_sources.folder()}", f"-arch={target}", "-Xptxas", "-v")
        command = ("nvcc", *options, "-cubin", str(source), "-o", str(Path(folder, "kernel.cubin")))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ptxas.resources(done.stdout + done.stderr)
