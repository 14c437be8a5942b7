"""Compiles Triton kernels for GPUs that are not there, and says what came out.

    job = Job("my_package.my_kernels", "forward", {"p_q": "*bf16", "T": "i32", "D": 64}, "sm_90")
    build(job).resources            # {"registers": 128, "stack_bytes": 0, "spill_loads": 0, ...}

Kernels go through ``kernel.warmup`` of Triton's JIT, so that they are specialised exactly as in a
launch with such arguments. That takes a process in which kernels are compiled, not interpreted:
jobs run in processes of their own, a batch in each. Triton's cache makes the second time cheap.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
CACHE = Path(__file__).resolve().parents[2] / "build" / "triton_cache"

Argument = str | int | float | bool | None


class BuildError(Exception):
    """Kernels that do not compile, with what the compiler said."""


@dataclass(frozen=True)
class Job:
    """A kernel, the kinds of its arguments, and what to compile it for.

    arguments by name:
        "*bf16"            pointer, aligned to 16 bytes as torch allocates
        "*bf16:unaligned"  pointer to an element somewhere in a tensor
        "i32:2048"         integer of this value, which decides how it is specialised
        "i32", "i64"       integer that is neither 1 nor a multiple of 16
        "fp32"             float
        "none"             absent pointer
        "=text"            constexpr string
        anything else      constexpr literal
    case: tells jobs of the same kernel apart, in ``id``.
    """

    module: str
    kernel: str
    arguments: Mapping[str, Argument]
    target: str
    num_warps: int = 4
    num_stages: int = 2
    case: str = ""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; there are {', '.join(TARGETS)}")

    @property
    def id(self) -> str:
        parts = (self.kernel, self.case, self.target, f"w{self.num_warps}", f"s{self.num_stages}")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Build:
    """What a job compiled to.

    resources: of NVIDIA registers, stack_bytes, spill_loads, spill_stores (LDL and STL
        instructions), shared_bytes and, on sm_100, tensor_memory_columns; of AMD vgprs, agprs,
        sgprs, vgpr_spills, sgpr_spills, scratch_bytes and shared_bytes.
    occupancy: blocks that fit on one multiprocessor; limited_by: what stops the next.
    instructions, hot_loop: instructions of the kernel and of its hottest loop, by family.
    hot_loop_opcodes: that loop with all modifiers, in order.
    program: digest of what Triton made of the kernel before it turned to a GPU (intermediate.py).
    asm: texts by name ("ttgir", "llir", "ptx", "sass" or "amdgcn").
    """

    job: Job
    resources: Mapping[str, int]
    occupancy: int
    limited_by: str
    instructions: Mapping[str, int]
    hot_loop: Mapping[str, int]
    hot_loop_opcodes: tuple[str, ...]
    threads: int
    program: str
    asm: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def spills(self) -> int:
        return sum(amount for name, amount in self.resources.items() if "spill" in name)

    def __str__(self) -> str:
        def counts(amounts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {amount}" for name, amount in amounts.items())

        return (
            f"{self.job.id}: {counts(self.resources)}\n"
            f"  {self.occupancy} blocks per multiprocessor, limited by {self.limited_by}\n"
            f"  all: {counts(self.instructions)}\n"
            f"  hot loop: {counts(self.hot_loop)}"
        )


def build(job: Job, keep_asm: bool = False) -> Build:
    """Compiles one job; ``build_all`` starts fewer processes for several."""
    return build_all([job], keep_asm=keep_asm)[0]


def build_all(jobs: Sequence[Job], workers: int = 1, keep_asm: bool = False) -> list[Build]:
    """Compiles jobs in this many processes, in the order of the jobs.

    Raises BuildError that names every job that does not compile.
    """
    batches = [list(jobs[start::workers]) for start in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(lambda batch: _run_batch(batch, keep_asm), batches))
    builds: list[Build | str] = [
        outcomes[position % workers][position // workers] for position in range(len(jobs))
    ]
    failures = [
        f"{job.id}: {outcome}"
        for job, outcome in zip(jobs, builds, strict=True)
        if isinstance(outcome, str)
    ]
    if failures:
        raise BuildError("\n".join(failures))
    return [outcome for outcome in builds if isinstance(outcome, Build)]


def _run_batch(jobs: list[Job], keep_asm: bool) -> list[Build | str]:
    """Builds, or what went wrong, from a process that compiles."""
    if not jobs:
        return []
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "jobs"), Path(folder, "builds")
        request.write_bytes(pickle.dumps((jobs, keep_asm)))
        command = [sys.executable, "-m", f"{__package__}.compiler", str(request), str(answer)]
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            names = ", ".join(job.id for job in jobs)
            raise BuildError(f"the compiler broke down on one of {names}:\n{done.stderr}")
        return pickle.loads(answer.read_bytes())


def _environment() -> dict[str, str]:
    """This process's, without interpretation, and with the modules that it can import."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.setdefault("TRITON_CACHE_DIR", str(CACHE))
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, which warns when unset
    return environment
