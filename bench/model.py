"""Where the static model says that the time of a kernel lies; no GPU had a part in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Results

FILE = Path(__file__).with_name("gpu_model.json")
LABEL = "MODEL, never run on a GPU"
HEAD = ("case", "architecture", LABEL, "measured", "it lies")


@dataclass(frozen=True)
class Interval:
    """Microseconds of a case on an architecture such as sm_90."""

    case: str  # as str(Case) writes it
    arch: str
    low_us: float
    high_us: float


def intervals(file: Path = FILE) -> list[Interval]:
    """The intervals of a file: a list of objects like Interval; none without a file.

    Raises:
        ValueError: the file holds something else.
    """
    if not file.exists():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_text())
        fields = ("case", "arch", "low_us", "high_us")
        return [Interval(*(entry[name] for name in fields)) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file.name}: {type(error).__name__}: {error}") from error


def compare(results: Results, model: list[Interval]) -> list[tuple[str, ...]]:
    """Of every interval whose case ran on its architecture: case, both, and where the time lies."""
    rows = []
    for interval in model:
        row = results.find(interval.case, "lolcats")
        if row is None or row.isa != interval.arch:
            continue
        us, low, high = 1e6 * row.median_s, interval.low_us, interval.high_us
        where = "inside"
        if not low <= us <= high:
            where = (
                f"at {us / high:.2f} x the end" if us > high else f"at {us / low:.2f} x the start"
            )
        cells = (f"{low:.3g} - {high:.3g} us", f"{us:.3g} us", where)
        rows.append((interval.case, interval.arch, *cells))
    return rows
