"""The device that a run measures: what it is, and what its ceilings are measured with."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import lolcats_ops as lo

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Ceilings:
    """The matrix product and the copy that a device's roofline is made of."""

    mm_size: int
    copy_bytes: int  # beyond the caches of all but the largest machines

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.mm_size**3

    @property
    def bytes(self) -> int:
        """Of the copy, read and written."""
        return 2 * self.copy_bytes


# Sizes at which both are at their rate: a GPU's product has to fill it, and its copy to outlast the
# start of a kernel.
CEILINGS = {
    "cpu": Ceilings(2048, 256 << 20),
    "cuda": Ceilings(8192, 1 << 30),
}


def why_absent(device: str) -> str | None:
    """Why this machine cannot run anything on the device, or None."""
    if device == "cpu":
        ours = lo.backend_for("feature_map")
        return None if ours.backend else ours.why
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs alone"
    return f"torch {torch.__version__} finds no GPU"


def machine(device: str) -> str:
    """The name of the CPU, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def isa(device: str) -> str:
    """The instruction set of torch's kernels: sm_90, gfx942, AVX2."""
    if device == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    properties = torch.cuda.get_device_properties()
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def synchronize(device: str) -> None:
    """Waits until the device has done what it was asked to.

    Raises:
        RuntimeError: a kernel of a GPU has failed. Nothing works in this process any more.
    """
    if device == "cuda":
        torch.cuda.synchronize()
