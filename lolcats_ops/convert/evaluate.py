"""Perplexity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lolcats_ops.convert.data import input_device, token_rows
from lolcats_ops.convert.progress import progress


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, data: Tensor, *, batch_size: int = 1, description: str = "perplexity"
) -> float:
    """Perplexity of `model` on token rows [N, T]: exp of the mean of its N (T - 1) losses, infinite
    where that is beyond a float.

    Args:
        model: a causal language model, converted or not; it comes back in the mode that it had.
        data: [N, T] token ids of the model's vocabulary, any integer dtype.
        batch_size: rows of a forward pass.
        description: what the progress bar is called.

    Raises:
        TypeError: `data` is no integer tensor; `model` is a wrapper without its methods.
        ValueError: it is not [N, T] with N >= 1 and T >= 2, or has ids beyond the vocabulary; a
            `batch_size` below 1.
        RuntimeError: logits that are not finite.

    >>> evaluate(model, pack([text], tokenizer, 1024))  # doctest: +SKIP
    14.2
    """
    data = token_rows("evaluate", data, model, 2)
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size is {batch_size}, needs >= 1")
    training = model.training
    total, seen = 0.0, 0
    try:
        model.eval()
        with progress(description, len(data)) as bar:
            for rows in data.split(batch_size):
                rows = rows.to(input_device(model))
                logits = model(rows, use_cache=False).logits[:, :-1].float()
                total += F.cross_entropy(
                    logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
                ).item()
                seen += rows[:, 1:].numel()
                if math.isnan(total):
                    raise RuntimeError("evaluate: the model's logits are not finite")
                bar.advance(len(rows), perplexity=_perplexity(total / seen))
    finally:
        model.train(training)
    return _perplexity(total / seen)


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
