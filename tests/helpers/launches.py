"""What calls of the Triton operators launch, compiled for GPUs that are not there.

The operators run on CPU tensors with Triton's driver replaced and every launch compiled instead, so
that what is compiled is what a call would launch. That takes processes in which Triton compiles:
this file is their program.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpu_on_cpu.ahead_of_time import CACHE, Build, BuildError, Job

SOFTMAX, EXP = (0, True, False, 1e-12), (1, True, False, 1e-12)  # two-sided maps
WINDOWS = {"sliding": (64, 0, 0), "terrace": (64, 1, 0), "sinks": (64, 0, 4), "none": (0, 0, 0)}
H, HK = 8, 2

T = TypeVar("T")
Options = dict[str, int]


@dataclass(frozen=True)
class Case:
    """Calls and shapes: heads enough for one segment, or few and long sequences."""

    name: str
    calls: tuple[str, ...]  # of CALLS
    dtype: str = "bf16"
    sizes: tuple[int, int, int] = (64, 64, 64)  # D, f (0: q and k are the features), V
    window: str = "sliding"
    segmented: bool = False
    codes: tuple[int, bool, bool, float] = SOFTMAX


HYBRID = ("hybrid",)
ALL = ("feature_map", "linear", *HYBRID, "step", "steps", "mse", "xent")
CASES = {
    case.name: case
    for case in (
        Case("bf16 64", ALL),
        Case("bf16 64 terrace", HYBRID, window="terrace"),
        Case("bf16 64 segments", HYBRID, segmented=True),
        Case("bf16 128x64", ALL, sizes=(128, 64, 128)),
        Case("bf16 64 exp", ("feature_map", *HYBRID, "step", "xent"), codes=EXP),
        Case("bf16 128x64 exp", HYBRID, sizes=(128, 64, 128), codes=EXP),
        Case("bf16 64x128", ("feature_map", *HYBRID, "xent"), sizes=(64, 128, 64)),
        Case("bf16 64x256", HYBRID, sizes=(64, 256, 64)),
        Case("bf16 128 plain", ("linear",), sizes=(128, 0, 128)),
        Case("bf16 256 plain", ("linear",), sizes=(256, 0, 256)),
        Case("fp32 64", HYBRID, dtype="fp32"),
        Case("fp16 64", ("feature_map", "linear", *HYBRID, "step"), dtype="fp16"),
    )
}


class Inputs:
    """Zeros of a case's shapes, as the operators' schemas order them."""

    def __init__(self, case: Case) -> None:
        import torch

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
        d, f, v = case.sizes
        batch, self.tokens = (1, 4096) if case.segmented else (64, 256)
        self.zeros: Callable[..., Any] = lambda *shape, kind=dtype: torch.zeros(shape, dtype=kind)
        self.fp32 = lambda *shape: torch.zeros(shape)
        self.int64 = torch.int64
        self.q = self.zeros(batch, H, self.tokens, d)
        self.k = self.zeros(batch, HK, self.tokens, d)
        self.v = self.zeros(batch, HK, self.tokens, v)
        self.y = self.zeros(batch, H, self.tokens, v)
        self.row = self.fp32(batch, H, self.tokens)
        weight = self.fp32(H, d, f) if f else None
        self.maps = (weight, None, weight, None)
        self.window = WINDOWS[case.window]
        self.codes = case.codes
        self.settings = (*self.window, d**-0.5, False, *self.codes)
        self.hybrid = (self.q, self.k, self.v, *self.maps, self.fp32(H), None, None)


def feature_map(kernels: Any, x: Inputs) -> None:
    weight = x.maps[0]
    kernels.feature_map(x.q, weight, None, *x.codes)
    dy = x.zeros(*x.q.shape[:3], 2 * weight.shape[2])
    kernels.feature_map_backward(dy, x.q, weight, None, *x.codes)


def linear(kernels: Any, x: Inputs) -> None:
    inputs, settings = (x.q, x.k, x.v, *x.maps, None, None, None, None), (1.0, True, 0.0, *x.codes)
    kernels.linear_attention(*inputs, *settings)
    kernels.linear_attention_backward(x.y, None, None, *inputs, x.y, x.row, *settings)


def hybrid(kernels: Any, x: Inputs) -> None:
    kernels.hybrid_attention(*x.hybrid, *x.settings)
    kernels.hybrid_attention_backward(x.y, *x.hybrid, x.y, x.row, x.row, *x.settings)


def new_tokens(kernels: Any, x: Inputs, count: int) -> None:
    size, kind, sink = x.window
    ring = size * (2 if kind else 1)
    stores = [
        x.zeros(x.k.shape[0], HK, n, like.shape[3])
        for n, like in ((ring, x.k), (ring, x.v), (sink, x.k), (sink, x.v))
    ]
    state = x.fp32(x.q.shape[0], H, 2 * x.maps[0].shape[2], x.v.shape[3])
    counts = [x.zeros(x.q.shape[0], kind=x.int64) for _ in range(2)]
    pool = (state, state[..., 0].contiguous(), *stores, *counts, None, None, None)
    new = [y[:, :, :count].contiguous() for y in (x.q, x.k, x.v)]
    kernels.hybrid_attention_step_(*new, *x.maps, x.fp32(H), *pool, size, kind, *x.settings[3:])


def transfer(kernels: Any, x: Inputs, xent: bool) -> None:
    one, saved = x.fp32(), (x.fp32(*x.y.shape), x.row, x.row, x.row, x.row)
    kernels.attention_transfer(*x.hybrid, xent, *x.settings)
    kernels.attention_transfer_backward(one, one, *x.hybrid, *saved, xent, *x.settings)


CALLS: dict[str, Callable[[Any, Inputs], None]] = {
    "feature_map": feature_map,
    "linear": linear,
    "hybrid": hybrid,
    "step": lambda kernels, x: new_tokens(kernels, x, 1),
    "steps": lambda kernels, x: new_tokens(kernels, x, x.tokens),
    "mse": lambda kernels, x: transfer(kernels, x, False),
    "xent": lambda kernels, x: transfer(kernels, x, True),
}


def build(target: str, case: Case, only: Collection[str] | None = None) -> list[Build]:
    """The kernels of a case, each of them once, or ``only`` those with these ids.

    This and the next are for a process in which Triton compiles.
    """
    from gpu_on_cpu.compiler import describe

    def compiled(job: Job, kernel: Any, grid: Any, arguments: tuple, options: Options) -> Any:
        if only is None or job.id in only:
            return describe(job, kernel.warmup(*arguments, grid=grid, **options))
        return None

    return [build for build in _of_each_kernel(target, case, compiled).values() if build]


def programs(target: str, cases: Sequence[Case]) -> dict[str, str]:
    """The digests of the cases' kernels (intermediate.py), by their ids."""
    from gpu_on_cpu.intermediate import digest_of

    found: dict[str, str] = {}
    for case in cases:
        found |= _of_each_kernel(target, case, lambda job, *launch: digest_of(*launch))
    return found


def _of_each_kernel(target: str, case: Case, wanted: Callable[..., T]) -> dict[str, T]:
    """By its id, what ``wanted`` makes of a job, its kernel, grid, arguments and options."""
    import triton
    from gpu_on_cpu.compiler import driver_for
    from lolcats_ops.kernels import triton as kernels
    from lolcats_ops.kernels.triton import launch

    found: dict[str, T] = {}
    label = ""

    def launched(kernel: Any, grid: Any, arguments: tuple, options: Options) -> None:
        name = f"{label} {case.name}"
        job = Job(kernel.fn.__module__, kernel.fn.__name__, {}, target, case=name, **options)
        if job.id not in found:
            found[job.id] = wanted(job, kernel, grid, arguments, options)

    launch._run = launched
    triton.runtime.driver.set_active(driver_for(target))
    x = Inputs(case)
    for label in case.calls:
        CALLS[label](kernels, x)
    return found


def build_all(
    jobs: Sequence[tuple[str, Case]], only: Collection[str] | None = None, workers: int = 2
) -> list[Build]:
    """The kernels of (target, case)s, in this many processes at a time."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda job: _in_a_process(build, *job, only), jobs)
        return [build for builds in found for build in builds]


def all_programs(jobs: Sequence[tuple[str, Case]], workers: int = 2) -> dict[str, str]:
    """The digests of the same kernels, a target in each process."""
    cases: dict[str, list[Case]] = {}
    for target, case in jobs:
        cases.setdefault(target, []).append(case)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda target: _in_a_process(programs, target, cases[target]), cases)
        return {name: program for some in found for name, program in some.items()}


def _in_a_process(function: Callable[..., T], target: str, *more: Any) -> T:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(CACHE))
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request"), Path(folder, "answer")
        request.write_bytes(pickle.dumps((function, target, *more)))
        command = [sys.executable, "-m", "helpers.launches", str(request), str(answer)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            raise BuildError(f"{target}, {more}:\n{done.stderr[-3000:]}")
        return pickle.loads(answer.read_bytes())


if __name__ == "__main__":
    function, *arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(function(*arguments)))
