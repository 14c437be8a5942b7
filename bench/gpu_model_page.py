"""docs/gpu_model.md, from gpu_model.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .gpu_model import LABEL, interval, model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu_model.md"
ROWS, TOKENS = 128, 8192  # heads and length that times are given for
# What the forward pass may take of its busiest pipe, in units of its memory traffic.
BARS = {"terrace": 1.0, "sliding": 1.3}

HEAD = f"""# Model of the Triton kernels on GPUs

**{LABEL}.** Renewed by `TRITON_INTERPRET=0 PYTHONPATH=tests:. python -m helpers.gpu_model`; the
numbers are in `bench/gpu_model.json`, and `bench.gpu_model.interval` answers for any length.

hybrid_attention in bf16, f = 64 two-sided, V = D, a window of 64. Every instruction of the machine
code occupies one pipe of a multiprocessor for a known time (`tests/gpu_on_cpu/pipe_model.py`); the
compiled PTX, run on a CPU, says how often every loop is executed. Latencies, barriers, bank
conflicts and what wgmma reads from shared memory are not in the model.
"""


def page() -> str:
    return "\n".join([HEAD, *_targets(), *_intervals(), *_chunks(), *_bars()]) + "\n"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _header(*cells: str) -> str:
    return f"{_row(*cells)}\n|{'---|' * len(cells)}"


def _targets() -> Iterator[str]:
    yield _header("target", "stands for", "multiprocessors", "clock, GHz", "bandwidth, TB/s")
    for target, gpu in model()["targets"].items():
        clock, bandwidth = gpu["clock"] / 1e9, gpu["bandwidth"] / 1e12
        yield _row(target, gpu["name"], gpu["multiprocessors"], clock, bandwidth)


def _intervals() -> Iterator[str]:
    yield f"\n## Intervals, {ROWS} heads, {TOKENS} tokens; a step is one token of each\n"
    yield "From the busiest pipe or memory alone to all of them one after another, in microseconds."
    yield "Bytes are those of a token and head, of a step of a head; bandwidth alone takes the time"
    yield "in the column after them.\n"
    yield _header("case", "target", "from", "to", "bytes", "bandwidth alone")
    for target, cases in model()["cases"].items():
        for case, kernels in cases.items():
            pass_, kind, D = case.split()
            found = interval(target, pass_, kind, int(D), rows=ROWS, tokens=TOKENS)
            size = sum(kernel["bytes"] for kernel in kernels)
            moved = size * ROWS * (1 if pass_ == "step" else TOKENS)
            alone = moved / model()["targets"][target]["bandwidth"]
            times = (f"{1e6 * x:.0f}" for x in (found.low, found.high))
            yield _row(case, target, *times, f"{size:.0f}", f"{1e6 * alone:.0f}")


PIPES = ("tensor", "special", "fma", "integer", "l1", "issue")


def _memory_cycles(target: str, kernel: dict[str, Any]) -> float:
    """Of a chunk, at a multiprocessor's share of the bandwidth."""
    gpu = model()["targets"][target]
    share = gpu["bandwidth"] / gpu["clock"] / gpu["multiprocessors"]
    return kernel["bytes"] * kernel["chunk"] / kernel["programs"] / share


def _chunks() -> Iterator[str]:
    yield "\n## Cycles of a chunk by pipe\n"
    yield "Memory: a multiprocessor's share of the bandwidth. Requested: bytes that the loads and"
    yield "stores ask for, over those that have to move.\n"
    yield _header("kernel", "case", "target", "chunk", *PIPES, "memory", "requested")
    for target, cases in model()["cases"].items():
        for case, kernels in cases.items():
            for kernel in kernels:
                if kernel["chunk"]:
                    cycles = (f"{kernel['cycles'][pipe]:.0f}" for pipe in PIPES)
                    memory = f"{_memory_cycles(target, kernel):.0f}"
                    requested = f"{kernel['requested'] / kernel['bytes']:.2f}"
                    name = kernel["kernel"]
                    yield _row(name, case, target, kernel["chunk"], *cycles, memory, requested)


def _bars() -> Iterator[str]:
    yield "\n## The forward pass on sm_90: busiest pipe against memory\n"
    yield _header("case", "busiest pipe", "of its memory traffic", "bar", "met")
    for case, (kernel, *_) in model()["cases"]["sm_90"].items():
        pass_, kind, _ = case.split()
        if pass_ == "forward":
            pipe = max(PIPES, key=kernel["cycles"].__getitem__)
            ratio = kernel["cycles"][pipe] / _memory_cycles("sm_90", kernel)
            met = "yes" if ratio <= BARS[kind] else "no"
            yield _row(case, pipe, f"{ratio:.3f}", BARS[kind], met)
