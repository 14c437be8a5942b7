"""Cycles that a chunk of hybrid_attention in CUDA C++ takes, by pipe: MODEL, not measured.

    PYTHONPATH=tests python -m helpers.cuda_model

The compiled PTX is run on the CPU with four and with six chunks: the difference, without what is
done once, is what two chunks take. gpu_on_cpu/executed.py turns it into machine instructions,
gpu_on_cpu/pipe_model.py these into cycles.
"""

from __future__ import annotations

from collections import Counter

import torch
from gpu_on_cpu.executed import executed_opcodes
from gpu_on_cpu.pipe_model import LABEL, pipes_of
from gpu_on_cpu.sass import disassembled

from lolcats_ops import _cuda_sources
from lolcats_ops.features import Features, init_weight

from . import emulated, nvrtc
from .emulated_attention import Kernels

CHUNK, SHORT, LONG = 64, 4, 6  # tokens; chunks
WINDOW = 64


class Executed:
    """Runs a kernel for a target and counts its machine instructions."""

    def __init__(self, target: str):
        self.target, self.kernel, self.warps = target, "", 0
        self.opcodes: Counter[str] = Counter()

    def __call__(self, **arguments: torch.Tensor | float) -> None:
        names = (*emulated.INPUTS, "m", "den")
        launch = emulated.planned("hybrid_attention", names, arguments)
        self.kernel, self.warps = launch.kernel, launch.warps // launch.blocks
        options = (*_cuda_sources.options(), f"-arch={self.target}", "-lineinfo")
        compiled = nvrtc.build(_cuda_sources.unit(self.kernel), options, self.kernel)
        report = launch.run(compiled.ptx, arguments)
        sass = disassembled(compiled.cubin, lines=True)
        self.opcodes = executed_opcodes(compiled.ptx, sass, report.executed)


def executed(target: str, D: int, chunks: int) -> Executed:
    """One head of so many chunks, bf16, f = 64, a sliding window."""
    q = torch.randn(1, 1, chunks * CHUNK, D, dtype=torch.bfloat16)
    features = Features(init_weight(1, D, 64))
    run = Executed(target)
    with torch.no_grad():
        Kernels(run).hybrid_attention(q, q, q, features, features, torch.zeros(1), window=WINDOW)
    return run


def cycles(target: str, D: int) -> tuple[str, dict[str, float]]:
    """The kernel, and what a multiprocessor takes for a chunk of a head, by pipe."""
    short, long = executed(target, D, SHORT), executed(target, D, LONG)
    long.opcodes.subtract(short.opcodes)
    by_warp = (LONG - SHORT) * long.warps
    opcodes = {opcode: n / by_warp for opcode, n in long.opcodes.items()}
    return long.kernel, pipes_of(opcodes, target, long.warps)


def main() -> None:
    print(LABEL)
    for target in ("sm_80", "sm_90"):
        for D in (64, 96, 128):
            kernel, pipes = cycles(target, D)
            print(target, kernel, {pipe: round(n) for pipe, n in pipes.items()}, flush=True)


if __name__ == "__main__":
    main()
