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
    """Prefills tokens [1, T] up to each context at once, then decodes from there, a token of each
    context in turn, so that a slow minute of the machine is one of all (medians)."""
    caches = {context: DynamicCache(config=model.config) for context in contexts}
    prefills, steps = {}, {context: [] for context in contexts}
    with progress(description, len(contexts) + decode_tokens + 1) as bar:
        for context, cache in caches.items():
            start = perf_counter()
            model(tokens[:, :context], past_key_values=cache, logits_to_keep=1)
            prefills[context] = perf_counter() - start
            bar.advance()
        nbytes = {context: lo.hf.cache_bytes(cache) for context, cache in caches.items()}
        for i in range(decode_tokens + 1):
            for context, cache in caches.items():
                start = perf_counter()
                model(tokens[:, i : i + 1], past_key_values=cache)
                steps[context].append(perf_counter() - start)
            bar.advance(tokens_per_s=1 / steps[contexts[-1]][-1])
    # The first step of each warms up.
    rates = {c: 1 / statistics.median(times[1:]) for c, times in steps.items()}
    return {c: ContextCost(prefills[c], nbytes[c], rates[c]) for c in contexts}


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
