"""Three pictures: perplexities, losses of stage 1, and what context costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HYBRID, SOFTMAX = "#1f77b4", "#d62728"


def draw(out: Path, report: dict[str, Any], losses: list[list[float]]) -> None:
    """perplexity.png, losses.png and context.png in `out`."""
    _perplexity(out / "perplexity.png", report["perplexity"])
    _losses(out / "losses.png", losses)
    _context(out / "context.png", report)


def _perplexity(path: Path, perplexity: dict[str, float]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    colors = [SOFTMAX if name.startswith("softmax") else HYBRID for name in perplexity]
    bars = axes.bar(
        [name.replace("_", "\n+ ") for name in perplexity], list(perplexity.values()), color=colors
    )
    axes.bar_label(bars, fmt="%.1f")
    axes.set_yscale("log")
    axes.set_ylabel("held-out perplexity")
    _save(figure, path)


def _losses(path: Path, losses: list[list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colors = matplotlib.colormaps["viridis"]
    for i, layer in enumerate(losses):
        axes.plot(
            range(1, len(layer) + 1),
            layer,
            color=colors(i / max(1, len(losses) - 1)),
            linewidth=0.8,
        )
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mse / var(softmax attention)")
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(0, max(1, len(losses) - 1)), colors
    )
    figure.colorbar(scale, ax=axes, label="layer")
    _save(figure, path)


def _context(path: Path, report: dict[str, Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name, color in (("hybrid", HYBRID), ("softmax", SOFTMAX)):
        speed, size = report["decode_tokens_per_s"][name], report["cache_bytes"][name]
        left.plot(
            [int(c) for c in speed],
            [1000 / s for s in speed.values()],
            "o-",
            color=color,
            label=name,
        )
        right.plot(
            [int(c) for c in size],
            [s / 2**20 for s in size.values()],
            "o-",
            color=color,
            label=name,
        )
    left.set_ylabel("ms per decoded token")
    left.set_ylim(bottom=0)
    right.set_ylabel("cache, MiB")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens")
        axes.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
