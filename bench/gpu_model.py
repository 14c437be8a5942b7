"""What a static model says of the Triton kernels on GPUs: intervals of time, not measurements.

The committed gpu_model.json has, for each case and target, what a chunk needs of each pipe of a
multiprocessor and what a token moves; ``python -m helpers.gpu_model`` (tests/) renews it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

LABEL = "MODEL, not measured"
DATA = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Interval:
    """Seconds.

    low: every multiprocessor's busiest pipe, or memory, is busy all the time.
    high: no two pipes work at the same time, and memory waits for both. Latencies and barriers are
        in neither.
    """

    low: float
    high: float


@cache
def model() -> dict[str, Any]:
    return json.loads(DATA.read_text())


def interval(
    target: str, pass_: str, window_kind: str, D: int, *, rows: int, tokens: int
) -> Interval | None:
    """Of hybrid_attention in bf16 with f = 64 and a window of 64, V = D, for ``rows`` heads of
    sequences of ``tokens`` tokens; of a step, one token of each. None for what is not modelled.

    >>> interval("sm_90", "forward", "terrace", 64, rows=32, tokens=8192).low > 0
    True
    """
    case = f"{pass_} {window_kind} {D}"
    data = model()
    if case not in data["cases"].get(target, {}):
        return None
    low = high = 0.0
    for kernel in data["cases"][target][case]:
        step = _kernel(data["targets"][target], kernel, rows, tokens)
        low, high = low + step.low, high + step.high
    return Interval(low, high)


def _kernel(gpu: dict[str, Any], kernel: dict[str, Any], rows: int, tokens: int) -> Interval:
    """One launch: its programs are blocks, spread over the multiprocessors."""
    trips = ceil(tokens / kernel["chunk"]) if kernel["chunk"] else 1
    moved = rows * kernel["bytes"] * (tokens if kernel["chunk"] else 1) / gpu["bandwidth"]
    blocks = rows * kernel["programs"] / gpu["multiprocessors"]
    cycles = kernel["cycles"].values()
    busiest, serial = (trips * x / gpu["clock"] for x in (max(cycles), sum(cycles)))
    return Interval(max(moved, busiest * blocks), moved + serial * ceil(blocks))
