"""Pictures of a run: time against T, decoding against the context, roofline, shares of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from math import exp, isinf, log
from pathlib import Path
from statistics import median
from typing import Any

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ImportError(f"bench: {error}; pip install --editable '.[bench]'") from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .cases import DECODE, FILLING, FILLING_DECODE, HYBRID, Case
from .report import duration
from .results import Results, Row

OURS, SOFTMAX = "#1f77b4", "#d62728"
COLORS = {"lolcats": OURS, "sdpa": SOFTMAX}
OTHERS = ("#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
OPS = {
    "hybrid_attention": OURS,
    "linear_attention": "#2ca02c",
    "attention_transfer": "#9467bd",
    "feature_map": "#ff7f0e",
}
MARKERS = {"forward": "o", "backward": "s", "forward+backward": "D", "step": "^"}
LINES = {"cpu": (HYBRID, DECODE[0]), "cuda": (FILLING, FILLING_DECODE)}  # drawn over T
NOT_LINES = ("lolcats:avx2", "lolcats_op", "lolcats_c")  # as fast as lolcats, or nearly


def draw(results: Results, folder: Path) -> list[Path]:
    """The pictures that the rows are enough for, as PNG files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    prefill, decode = LINES[results.device]
    pictures = {
        "time": lambda rows: _against_length(rows, prefill, "hybrid forward", "T, tokens"),
        "decode": lambda rows: _against_length(rows, decode, "one decode step", "context, tokens"),
        "roofline": _roofline,
        "ceilings": _shares,
    }
    for name, picture in pictures.items():
        figure = picture(results.rows)
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier run
        if figure is not None:
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=150)
            plt.close(figure)
    return drawn


def crossover(ours: Sequence[tuple[int, float]], softmax: Sequence[tuple[int, float]]) -> float:
    """From which T on ours is faster, interpolated on logarithmic axes; points are (T, seconds).

    The first T both have, or inf, where it is faster at all or at none of them.
    """
    theirs = dict(softmax)
    lead = [(log(T), log(theirs[T] / s)) for T, s in sorted(ours) if T in theirs]
    if not lead or lead[-1][1] <= 0:
        return float("inf")
    behind = [i for i, (_, ratio) in enumerate(lead) if ratio <= 0]
    if not behind:
        return exp(lead[0][0])
    (x0, y0), (x1, y1) = lead[behind[-1]], lead[behind[-1] + 1]
    return exp(x0 + (x1 - x0) * -y0 / (y1 - y0))


def _against_length(rows: list[Row], like: Case, what: str, x_label: str) -> Any:
    """Median time against T of the rows of a case; None if fewer than two lengths."""
    same = [f.name for f in fields(Case) if f.name not in ("T", "peers")]
    chosen = [row for row in rows if all(getattr(row, n) == getattr(like, n) for n in same)]
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in chosen:
        if row.implementation not in NOT_LINES:
            lines.setdefault(row.implementation, []).append((row.T, row.median_s))
    if max((len(points) for points in lines.values()), default=0) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    others = iter(OTHERS * 3)
    for name, points in lines.items():
        color = COLORS.get(name) or next(others)
        style = {"marker": "o", "markersize": 5}
        if len(points) == 1:  # often on top of others
            style = {"marker": "s", "markersize": 9, "fillstyle": "none", "linestyle": "none"}
        axes.plot(*zip(*sorted(points), strict=True), color=color, label=name, **style)
    title = [_title(what, chosen[0])]
    if "lolcats" in lines and "sdpa" in lines:
        T = crossover(lines["lolcats"], lines["sdpa"])
        title.append(_mark_crossover(axes, T, lines["sdpa"]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row.T for row in chosen})
    axes.set_xticks(lengths, [str(T) for T in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # times may lie within one decade
    axes.yaxis.set_major_formatter(FuncFormatter(lambda s, _: duration(s)))
    axes.set_xlabel(x_label)
    axes.set_ylabel("median time")
    axes.set_title("\n".join(title), fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _mark_crossover(axes: Any, T: float, softmax: list[tuple[int, float]]) -> str:
    """A line at T, if it lies among the lengths of softmax; and what it means, in words."""
    lengths = [length for length, _ in softmax]
    if isinf(T):
        return f"softmax (sdpa) is faster up to T = {max(lengths)}"
    if round(T) <= min(lengths):
        return f"faster than softmax (sdpa) from T = {min(lengths)} on, or before"
    axes.axvline(T, color="gray", linestyle="--", linewidth=1)
    return f"faster than softmax (sdpa) from T = {T:.0f} on"


def _roofline(rows: list[Row]) -> Any:
    """GFLOP/s against FLOPs per byte of our rows, the longest of each kind, whose useful FLOPs all
    are there, under the ceilings."""
    rows = [row for row in rows if row.implementation == "lolcats"]
    if not rows:
        return None
    roofs: dict[str, list[float]] = {}
    for row in rows:
        roofs.setdefault(row.dtype, []).append(row.mm_gflops_per_s)
    products = {dtype: median(rates) for dtype, rates in roofs.items()}
    mm = max(products.values())
    copy = median(row.copy_gbytes_per_s for row in rows)
    kinds: dict[tuple[object, ...], Row] = {}
    for row in rows:
        shape = (row.D, row.V, row.f, row.B) if row.pass_ == "step" else (row.D, row.V, row.f)
        key = (row.op, row.pass_, row.dtype, *shape)
        if key not in kinds or row.T > kinds[key].T:
            kinds[key] = row
    figure, axes = plt.subplots(figsize=(11.5, 4.8), layout="constrained")
    points = sorted(((row.flops / row.bytes, row) for row in kinds.values()), key=_position)
    intensities = [intensity for intensity, _ in points]
    low, high = min(*intensities, mm / copy) / 2, max(*intensities, mm / copy) * 2
    for dtype, rate in products.items():
        style = "solid" if dtype == "float32" else "dashed"
        axes.plot(
            [min(low, rate / copy), rate / copy, high],
            [min(low * copy, rate), rate, rate],
            linestyle=style,
            color="black",
            linewidth=1,
        )
        axes.annotate(
            f"torch.mm for {dtype} {rate:.0f} GFLOP/s",
            (high, rate),
            (0, 5),
            textcoords="offset points",
            ha="right",
        )
    middle = (low * mm / copy) ** 0.5
    axes.annotate(
        f"copy {copy:.0f} GB/s",
        (middle, middle * copy),
        (-8, 0),
        textcoords="offset points",
        ha="right",
    )
    for i, (intensity, row) in enumerate(points, 1):
        aside = (8, -3) if i % 2 else (-8, -3)  # neighbours are numbered on different sides
        axes.annotate(
            str(i),
            (intensity, row.gflops_per_s),
            aside,
            textcoords="offset points",
            ha="left" if i % 2 else "right",
            fontsize=8,
        )
        axes.plot(
            intensity,
            row.gflops_per_s,
            MARKERS[row.pass_],
            color=OPS[row.op],
            markersize=8,
            alpha=0.85,
            fillstyle="full" if row.dtype == "float32" else "none",
            markeredgewidth=1.6,
            linestyle="none",
            label=f"{i}  {_kind(row)}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_ylim(top=1.7 * max(mm, *(row.gflops_per_s for row in kinds.values())))
    axes.set_xlabel("useful FLOPs per byte that must move")
    axes.set_ylabel("useful GFLOP/s")
    axes.set_title(f"{_machine(rows[0])}, {rows[0].isa}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _shares(rows: list[Row]) -> Any:
    """Our bandwidth over the copy's and our FLOP rate over torch.mm's, a pair of bars per case."""
    rows = [row for row in rows if row.implementation == "lolcats"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * len(rows)), layout="constrained")
    for label, offset, color, share in (
        ("bandwidth / copy", -0.2, OURS, lambda row: row.gbytes_per_s / row.copy_gbytes_per_s),
        ("FLOP rate / torch.mm", 0.2, SOFTMAX, lambda row: row.gflops_per_s / row.mm_gflops_per_s),
    ):
        places = [i + offset for i in range(len(rows))]
        axes.barh(places, [share(row) for row in rows], 0.4, color=color, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.case for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axes.set_xlabel("useful work, as a share of what was measured of the device")
    axes.set_title(_machine(rows[0]), fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def _position(point: tuple[float, Row]) -> tuple[float, float]:
    """From left to right, of like intensities from the top."""
    intensity, row = point
    return round(log(intensity), 1), -row.gflops_per_s


def _kind(row: Row) -> str:
    parts = [f"{row.op} {row.pass_}"]
    plain = Case(row.op)
    for name in ("B", "D", "V"):
        if getattr(row, name) != getattr(plain, name):
            parts.append(f"{name}={getattr(row, name)}")
    if row.dtype != "float32":
        parts.append(row.dtype)
    return ", ".join(parts)


def _title(what: str, row: Row) -> str:
    shape = f"B={row.B}, H={row.H}, D={row.D}, f={row.f}, w={row.window}, {row.dtype}"
    return f"{what}, {shape}; {_machine(row)}"


def _machine(row: Row) -> str:
    return row.machine if row.device == "cuda" else f"{row.machine}, {row.threads} threads"
