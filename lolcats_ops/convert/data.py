"""Text to token sequences of one length."""

from __future__ import annotations

import json
import warnings
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats_ops.convert.progress import progress

BATCH = 2**20  # characters that are tokenized at a time: some 180 bytes of memory for each


def read_texts(paths: Iterable[Path | str]) -> list[str]:
    """The texts of UTF-8 files: of JSON lines (.jsonl, .ndjson) the "text" of each, else the whole
    file.

    Raises:
        OSError: a file that cannot be read. ValueError: no files, or one that is no text.
        TypeError: one path for paths.

    >>> from tempfile import NamedTemporaryFile
    >>> with NamedTemporaryFile("w", suffix=".txt") as file:
    ...     _ = file.write("Call me Ishmael.")
    ...     file.flush()
    ...     read_texts([file.name])
    ['Call me Ishmael.']
    """
    if isinstance(paths, str | Path):
        raise TypeError("read_texts: paths is one path, needs a list of them")
    texts = [text for path in paths for text in _read(Path(path))]
    if not texts:
        raise ValueError("read_texts: needs at least one file")
    return texts


def _read(path: Path) -> list[str]:
    try:
        whole = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_texts: {path} is not UTF-8 text, by its byte {error.start}: {error.reason}; "
            "compressed files and other encodings are not read"
        ) from error
    texts, kind = [whole], path.suffix.lower()
    if kind == ".json":
        raise ValueError(f"read_texts: {path}: JSON is read as lines of objects (.jsonl) alone")
    if kind in (".jsonl", ".ndjson"):
        lines = enumerate(whole.split("\n"), 1)
        texts = [_text_of(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not any(text.strip() for text in texts):
        raise ValueError(f"read_texts: {path} holds no text")
    return texts


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"read_texts: {where} is not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'read_texts: {where} is no object with a string "text"')
    _refuse_halves(f"read_texts: {where}", text)
    return text


def _refuse_halves(where: str, text: str) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{where} has {half}, half of a character") from error


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    sequences: int | None = None,
) -> Tensor:
    """Tokens of all texts, cut into rows [N, length] (int64).

    A text begins with the token that the tokenizer begins texts with (Llama's and Gemma's do, by
    a beginning-of-sequence token), and has an end-of-sequence token behind it, if there is one.
    What does not fill the last row is dropped. Texts of more than a million characters are
    tokenized in pieces, which end with a line where that is possible.

    Args:
        sequences: only the first so many rows; texts beyond them are not tokenized.

    Raises:
        ValueError: fewer tokens than one row, rows of no token, or half of a surrogate pair.
        TypeError: one string for texts, or what is none among them.

    Warns:
        UserWarning: nothing ends one text before the next.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "</s>": 2}, unk_token="the"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    >>> pack(["the cat", "cat the cat"], tokenizer, 3)
    tensor([[0, 1, 2],
            [1, 0, 1]])
    """
    if isinstance(texts, str):
        raise TypeError("pack: texts is one string, needs a list of them")
    if length < 1:
        raise ValueError(f"pack: length is {length}, needs at least 1")
    if sequences is not None and sequences < 1:
        raise ValueError(f"pack: sequences is {sequences}, needs at least 1")
    texts = list(texts)
    if not texts:
        raise ValueError("pack: needs at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"pack: text {i} is a {type(text).__name__}, needs a str")
        _refuse_halves(f"pack: text {i}", text)
    begin = _begin(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not end and len(texts) > 1:
        warnings.warn(
            "pack: the tokenizer has no end-of-sequence token, so texts follow each other without",
            stacklevel=2,
        )
    ids = array("q")
    with progress("tokenizing", sum(1 for text in texts for _ in _pieces(text))) as bar:
        for batch in _batches(texts):
            encoded = tokenizer(
                [piece.text for piece in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            for piece, tokens in zip(batch, encoded["input_ids"], strict=True):
                ids.extend([*(begin if piece.first else []), *tokens])
                ids.extend(end if piece.last else [])
            bar.advance(len(batch))
            if sequences is not None and len(ids) >= sequences * length:
                break
    rows = len(ids) // length
    if rows == 0:
        raise ValueError(
            f"pack: the text has {len(ids)} tokens, needs at least {length} for one sequence"
        )
    rows = rows if sequences is None else min(rows, sequences)
    return torch.frombuffer(ids, dtype=torch.int64, count=rows * length).view(rows, length)


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins a text with."""
    bos = tokenizer.bos_token_id
    return [] if bos is None or tokenizer("")["input_ids"][:1] != [bos] else [bos]


class _Piece(NamedTuple):
    """A part of a text that is tokenized by itself."""

    text: str
    first: bool
    last: bool


def _pieces(text: str) -> Iterator[_Piece]:
    """The text in pieces of up to BATCH characters, which end with a line, or before a blank, if
    there is one."""
    start = 0
    while len(text) - start > BATCH:
        stop = start + BATCH
        end = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start + 1, stop)
        end = end if end > start else stop
        yield _Piece(text[start:end], start == 0, False)
        start = end
    yield _Piece(text[start:], start == 0, True)


def _batches(texts: Iterable[str]) -> Iterator[list[_Piece]]:
    """Pieces one after another, as many as a tokenizer's threads want, of bounded size."""
    batch: list[_Piece] = []
    characters = 0
    for piece in (piece for text in texts for piece in _pieces(text)):
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids: on the device of its embedding, or to which accelerate
    brings that."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def refuse_offloaded(caller: str, names: Iterable[str]) -> None:
    """Raises ValueError where parameters are somewhere else than where they are trained."""
    lost = sorted(names)
    if lost:
        raise ValueError(
            f"{caller}: {len(lost)} parameters are offloaded (on the meta device), where nothing "
            f"trains them: {', '.join(lost[:3])}; load the model with a device_map that keeps them"
        )


def refuse_sharded(caller: str, model: PreTrainedModel) -> None:
    """Raises ValueError where parameters are distributed tensors, each process with a part."""
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise ValueError(f"{caller}: the model is sharded (DTensor): train it before fully_shard()")


def token_rows(caller: str, data: Tensor, model: PreTrainedModel, least: int = 1) -> Tensor:
    """`data` as int64, if it is rows [N, T] of tokens that `model` has, N >= 1 and T >= `least`.

    Raises:
        TypeError: no integer tensor, or no model of transformers.
        ValueError: another shape, or ids beyond the vocabulary.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"{caller}: model is {type(model).__name__}, needs a PreTrainedModel, such as the "
            "one that a wrapper holds"
        )
    kind = data.dtype if isinstance(data, Tensor) else f"a {type(data).__name__}"
    if not isinstance(data, Tensor) or kind == torch.bool or kind.is_floating_point:
        raise TypeError(f"{caller}: data is {kind}, needs an integer tensor [N, T] of token ids")
    if data.dim() != 2 or data.shape[0] < 1 or data.shape[1] < least:
        raise ValueError(
            f"{caller}: data is {list(data.shape)}, needs [N, T] with N >= 1 and T >= {least}"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    low, high = (int(x) for x in data.long().aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{caller}: data has token ids from {low} to {high}, the model's vocabulary "
            f"{vocabulary}: is the tokenizer that of another model?"
        )
    return data.long()
