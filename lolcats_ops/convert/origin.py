"""What decides the result of a training run, in digests: a checkpoint goes on with nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats_ops.hf import attention_layers

SAMPLE = 4096  # elements of a weight that tell models apart


def origin(
    model: PreTrainedModel,
    data: Tensor,
    configuration: Mapping[str, Any],
    others: Mapping[str, Any],
    *,
    features: bool,
) -> dict[str, str]:
    """Digests of the three, and of others by their names; of large weights it is a sample.

    Args:
        features: whether the model's feature maps and gates decide the result as well. They do not
            where they are what is trained: a checkpoint has them.
    """

    def digest(*values: Any) -> str:
        found = hashlib.sha256()
        for value in values:
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            found.update(value if isinstance(value, bytes) else repr(value).encode())
        return found.hexdigest()

    parameters = [
        x.flatten()
        for name, x in model.named_parameters()
        if (features or ".lolcats." not in name) and not x.is_meta
    ]
    weights = [x[:: max(1, len(x) // SAMPLE)] for x in parameters]
    return {
        "model": digest(*(layer.config for layer in attention_layers(model)), *weights),
        "data": digest(list(data.shape), data),
        "configuration": digest(dict(configuration)),
        **{name: digest(value) for name, value in others.items()},
    }


def refuse_others(
    caller: str, path: Path | str, begun: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Refuses to go on from `path`, which was `begun` with something else, or says nothing.

    Raises:
        ValueError: naming `path` and what differs.
    """
    if others := [name for name, value in now.items() if begun.get(name) != value]:
        was = f"was begun with another {' and another '.join(others)}"
        raise ValueError(
            f"{caller}: {path} {was if begun else 'does not say what it was begun with'}; "
            "delete it, or keep the checkpoints elsewhere"
        )
