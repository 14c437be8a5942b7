"""What the commands of cli.py load and save: models, their tokenizers and settings, texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .convert import ConversionConfig
from .convert.config import fields_of
from .convert.files import is_whole, replacing_files
from .convert.processes import part, processes
from .convert.progress import console
from .hf import LolcatsConfig  # whose import registers the model type of converted models
from .hf.auto import refuse_gaps


def settings_of(config: Path | None, changes: Iterable[str] | None, model: str) -> ConversionConfig:
    """The settings of a file and of --set; those that neither names are as ``model`` was made
    with."""
    made_with = Path(model) / "lolcats.yaml"
    files = [made_with] if made_with.is_file() else []
    if config:
        files.append(config)
    return ConversionConfig.load(*files, changes=changes or ())


def as_converted(
    settings: ConversionConfig,
    config: Path | None,
    changes: Iterable[str] | None,
    model: PreTrainedModel,
) -> ConversionConfig:
    """``settings`` with the attention that the model has, which the given ones must not
    contradict."""
    has = LolcatsConfig.from_dict(model.config.lolcats)
    given = fields_of(*([config] if config else []), changes=changes or ()).get("lolcats") or {}
    named = {*given} - {"init", "gate_init"}  # those are of the beginning
    asked = settings.lolcats.to_dict()
    others = [
        f"{name}={value}"
        for name, value in has.to_dict().items()
        if name in named and value != asked[name]
    ]
    if others:
        raise ValueError(
            "the given settings are of another attention than the converted model has, which is "
            + ", ".join(others)
        )
    return settings.model_copy(update={"lolcats": has})


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors about a model that is no folder say so."""
    if Path(path).is_file():
        raise NotADirectoryError(f"{path} is a file; MODEL is a folder or a hub id")
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: no such folder")  # and no hub id, for which one may wait
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise
        raise FileNotFoundError(f"{path}: no such folder; and as a hub id: {error}") from error


def note_length(path: str, tokens: int) -> None:
    """Says where more tokens are asked of a model than the rows had that it was made with."""
    made_with = Path(path) / "lolcats.yaml"
    if made_with.is_file() and tokens > (length := ConversionConfig.load(made_with).data.length):
        console.print(
            f"note: {path} was made with rows of {length} tokens (data.length); how well it reads "
            f"{tokens} is another question, which lolcats eval --length {tokens} answers"
        )


def bytes_of(model: PreTrainedModel) -> int:
    """What its tensors take, in memory and about as much in files."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


@contextmanager
def data_parallel(device: str | None) -> Iterator[bool]:
    """Work that processes share, where torchrun has started several; yields whether this one is to
    save and to report what comes of it."""
    index, _ = processes(device)
    yield index == 0
    part()


def load(path: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on ``device``, None for the GPU if there is one, and its tokenizer.

    Raises:
        ValueError: naming the file that was not written to its end, or weights that are missing.
        OSError: there is no such folder, nor such a model on the hub.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device).item()
    except Exception as error:  # a name that is none, or of what this PyTorch lacks
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {device}: this PyTorch finds no such device: {why}") from error
    try:
        with naming(path):
            if Path(path).is_dir():  # of which an adapter says what it is on
                path = str(Path(path).resolve())
            model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            tokenizer = _tokenizer(path)
    except Exception as error:
        kinds = ("*.safetensors", "*.json", "pytorch_model*.bin")
        files = (file for kind in kinds for file in sorted(Path(path).glob(kind)))
        broken = next((file for file in files if not is_whole(file)), None)
        if broken is None:
            raise
        raise ValueError(f"{broken} is not whole: {error}") from error
    refuse_gaps("MODEL", path, info["missing_keys"])
    return model.to(device), tokenizer


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        if Path(path).is_dir() and not any(Path(path).glob("*token*")):  # as of a Trainer
            raise ValueError(
                f"{path} has no tokenizer: save the original model's there, as "
                f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({path!r}); transformers "
                "might read files that are only copied as another class"
            ) from error
        raise
    return tokenizer


def load_whole(path: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same, of a model that is to be changed and saved.

    Raises:
        ValueError: ``path`` is an adapter on a model, of which transformers would save the adapter.
    """
    model, tokenizer = load(path, device)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{path} is an adapter (PEFT) on {model.name_or_path}; merge it into that first: "
            "import lolcats_ops.hf, and save what "
            "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload() returns"
        )
    return model, tokenizer


def save(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ConversionConfig,
) -> None:
    """Writes all that a folder of a model holds; what fails before that is whole leaves the one
    before."""
    with replacing_files(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings.save(folder / "lolcats.yaml")
