"""The process behind ``ahead_of_time``: ``python -m gpu_on_cpu.compiler JOBS BUILDS``."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from . import amdgcn, occupancy, sass
from .ahead_of_time import Argument, Build, Job
from .intermediate import digest
from .listing import Listing, histogram

_TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "i1": torch.bool,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
}
# Neither is 1 or a multiple of 16, which the JIT would specialise on.
_UNREMARKABLE = {"i32": 7, "i64": (1 << 40) + 7}


class _Driver:
    """What the JIT asks of the driver of a GPU when it only compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, Any]:
        return self.target.backend, self.target.arch  # the JIT keeps its kernels by device

    def get_current_stream(self, device: object = None) -> int:
        return 0


class _Unaligned(MockTensor):
    @staticmethod
    def data_ptr() -> int:
        return 8


def _value(argument: Argument) -> Any:
    """A value that the JIT takes for what the job describes."""
    if not isinstance(argument, str):
        return argument
    if argument.startswith("="):
        return argument[1:]
    if argument == "none":
        return None
    if argument == "fp32":
        return 0.5
    kind, _, detail = argument.partition(":")
    if kind.startswith("*") and detail in ("", "unaligned"):
        return (_Unaligned if detail else MockTensor)(_TYPES[kind[1:]])
    if kind in _UNREMARKABLE:
        return int(detail) if detail else _UNREMARKABLE[kind]
    raise ValueError(f"unknown kind of argument {argument!r}; see Job")


def driver_for(target: str) -> _Driver:
    """A driver to make Triton's active one, so that launches can be compiled for ``target``."""
    return _Driver(_TARGETS[target])


def _compile(job: Job) -> Any:
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    arguments = {name: _value(argument) for name, argument in job.arguments.items()}
    triton.runtime.driver.set_active(driver_for(job.target))
    return kernel.warmup(grid=(1,), num_warps=job.num_warps, num_stages=job.num_stages, **arguments)


def build(job: Job, keep_asm: bool) -> Build:
    return describe(job, _compile(job), keep_asm)


def describe(job: Job, compiled: Any, keep_asm: bool = False) -> Build:
    """What a kernel compiled to, by whatever way; of the job, target and number of warps count."""
    made = (
        _made_for_amd(job, compiled) if job.target == "gfx942" else _made_for_nvidia(job, compiled)
    )
    hot_loop = made.listing.hottest_loop()
    texts = {name: text for name, text in compiled.asm.items() if isinstance(text, str)}
    return Build(
        job=job,
        resources={**made.resources, "shared_bytes": compiled.metadata.shared},
        occupancy=made.blocks,
        limited_by=made.limit,
        instructions=histogram(made.listing.opcodes),
        hot_loop=histogram(hot_loop),
        hot_loop_opcodes=hot_loop,
        threads=made.threads,
        program=digest(compiled.asm["ttir"]),
        asm={**texts, **made.texts} if keep_asm else {},
    )


@dataclass
class _Made:
    """What the vendors' machine codes have in common."""

    listing: Listing
    resources: dict[str, int]
    blocks: int
    limit: str
    threads: int
    texts: dict[str, str] = field(default_factory=dict)


def _made_for_nvidia(job: Job, compiled: Any) -> _Made:
    cubin = sass.read_cubin(compiled.asm["cubin"])
    instructions = histogram(cubin.listing.opcodes)
    columns = compiled.metadata.tmem_size
    resources = {
        "registers": cubin.registers,
        "stack_bytes": cubin.stack_bytes,
        "spill_loads": instructions.get("LDL", 0),
        "spill_stores": instructions.get("STL", 0),
    } | ({"tensor_memory_columns": columns} if columns else {})
    # Warp specialisation adds warps to those of the job; the PTX has the total.
    stated = re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])
    threads = int(stated[1]) if stated else 32 * job.num_warps
    blocks, limit = occupancy.blocks_per_sm(
        job.target, cubin.registers, compiled.metadata.shared, threads, columns
    )
    return _Made(cubin.listing, resources, blocks, limit, threads, {"sass": cubin.text})


def _made_for_amd(job: Job, compiled: Any) -> _Made:
    text, lds_bytes = compiled.asm["amdgcn"], compiled.metadata.shared
    waves = amdgcn.waves_per_simd(text)
    blocks, limit = occupancy.blocks_per_cu(waves, lds_bytes, job.num_warps)
    listing, resources = amdgcn.read_amdgcn(text), amdgcn.resources(text)
    return _Made(listing, resources, blocks, limit, 64 * job.num_warps)


def main(request: str, answer: str) -> None:
    jobs, keep_asm = pickle.loads(Path(request).read_bytes())
    outcomes: list[Build | str] = []
    for job in jobs:
        try:
            outcomes.append(build(job, keep_asm))
        except Exception:  # one job's failure is its answer, not that of the others
            outcomes.append(traceback.format_exc())
    Path(answer).write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
