"""Text to token sequences of one length."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def read_texts(paths: Iterable[Path | str]) -> list[str]:
    """The contents of UTF-8 text files.

    Raises:
        OSError: a file that cannot be read. ValueError: no files, or one without text.
    """
    texts = {str(path): Path(path).read_text(encoding="utf-8") for path in paths}
    if not texts:
        raise ValueError("read_texts: needs at least one file")
    for path, text in texts.items():
        if not text.strip():
            raise ValueError(f"read_texts: {path} holds no text")
    return list(texts.values())


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Tokens of all texts, one end-of-sequence token after each, cut into rows [N, length] (int64).

    What does not fill the last row is dropped.

    Raises:
        ValueError: fewer tokens than one row.
    """
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        ids += encoded
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    rows = len(ids) // length
    if rows == 0:
        raise ValueError(f"pack: the text has {len(ids)} tokens, needs at least {length} for one sequence")
    return torch.tensor(ids[: rows * length]).view(rows, length)


def split(rows: Tensor, held_out: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Shuffles rows [N, T] and sets a share of them aside: (training, held out).

    >>> [len(part) for part in split(torch.arange(20).view(10, 2), 0.2)]
    [8, 2]
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    kept = len(rows) - round(held_out * len(rows))
    return rows[order[:kept]], rows[order[kept:]]
