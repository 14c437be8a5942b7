"""Speed, cache size and memory."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import lolcats_ops as lo
from lolcats_ops.convert.progress import progress


@dataclass(frozen=True)
class ContextCost:
    """What a context of some length costs one sequence."""

    prefill_s: float
    cache_bytes: int
    decode_tokens_per_s: float


@torch.no_grad()
def context_costs(
    model: PreTrainedModel,
    tokens: Tensor,
    contexts: tuple[int, ...],
    decode_tokens: int,
    description: str,
) -> dict[int, ContextCost]:
    """Prefills tokens [1, T] up to each context at once, then decodes from there (median step)."""
    costs = {}
    with progress(description, len(contexts)) as bar:
        for context in contexts:
            cache = DynamicCache(config=model.config)
            start = perf_counter()
            model(tokens[:, :context], past_key_values=cache, logits_to_keep=1)
            prefill = perf_counter() - start
            nbytes = lo.hf.cache_bytes(cache)
            steps = []
            for i in range(decode_tokens + 1):
                start = perf_counter()
                model(tokens[:, i : i + 1], past_key_values=cache)
                steps.append(perf_counter() - start)
            rate = 1 / statistics.median(steps[1:])  # the first step warms up
            costs[context] = ContextCost(prefill, nbytes, rate)
            bar.advance(tokens_per_s=rate)
    return costs


def crossover(hybrid: dict[int, ContextCost], softmax: dict[int, ContextCost]) -> str:
    """From which context on the hybrid decodes faster, interpolated between the measured ones."""
    contexts = sorted(hybrid)
    lead = [
        1 / softmax[c].decode_tokens_per_s - 1 / hybrid[c].decode_tokens_per_s for c in contexts
    ]
    if lead[0] >= 0:
        return f"hybrid faster from {contexts[0]} tokens or fewer"
    for (a, x), (b, y) in zip(
        zip(contexts, lead, strict=True), zip(contexts[1:], lead[1:], strict=True), strict=False
    ):
        if y >= 0:
            return f"hybrid faster from about {round(a + (b - a) * -x / (y - x))} tokens"
    return f"softmax faster up to {contexts[-1]} tokens"


def stage1_peaks(model: Path, lengths: tuple[int, ...], layers: int) -> dict[int, int | None]:
    """Peak memory of stage 1 above the loaded model, each length in a process of its own.

    None where the system does not tell (other than Linux).
    """
    peaks: dict[int, int | None] = {}
    with progress("stage 1 memory", len(lengths)) as bar:
        for length in lengths:
            command = [
                sys.executable,
                "-m",
                "examples.demo.peak",
                str(model),
                str(length),
                str(layers),
            ]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[length] = int(output) if output.strip() else None
            bar.advance()
    return peaks


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "threads": torch.get_num_threads(), "system": platform.platform()}


def versions() -> dict[str, str]:
    """The versions that matter."""
    return {
        "lolcats_ops": lo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
