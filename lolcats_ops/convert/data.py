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
        raise ValueError(
            f"pack: the text has {len(ids)} tokens, needs at least {length} for one sequence"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)
