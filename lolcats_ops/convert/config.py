"""One configuration for a whole conversion: what the model becomes, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from lolcats_ops.hf import LolcatsConfig

Positive = Annotated[int, Field(gt=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Finite = Field(allow_inf_nan=False, strict=True)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and keys are unique, as they are in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, whose keys YAML 1.1 may name twice, the last one to hold."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.MarkedYAMLError(f"{key!r} is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """How text becomes training sequences.

    Args:
        length: tokens of a packed sequence, as many as the model is to read in the end; at least 2:
            of one alone, none is predicted.
    """

    length: Annotated[int, Field(ge=2, strict=True)] = 1024


class TransferConfig(_Section):
    """Stage 1, attention transfer (SPEC 7): each layer learns to imitate its softmax attention.

    A batch runs through the model once; inside each layer it is cut into micro-batches, one
    optimizer step each.

    Args:
        learning_rate: of AdamW, the peak of OneCycle; 1e-2 as published.
        batch_size: sequences of a forward pass of the model.
        micro_batch: sequences of an optimizer step of a layer.
        rounds: steps of each micro-batch. Queries and keys do not depend on what is learned, so
            that one forward pass can serve several; more rounds cost less than more passes, and
            see less text.
        epochs: passes over the data.
        mse, xent: weights of the two losses, not both 0.
        normalize: divide the mse by the teacher's variance: published errors of layers differ by up
            to 2400 times.
        seed: of the order of the data.
    """

    learning_rate: Annotated[float, Field(gt=0), Finite] = 1e-2
    batch_size: Positive = 8
    micro_batch: Positive = 1
    rounds: Positive = 1
    epochs: Positive = 1
    mse: Annotated[float, Field(ge=0), Finite] = 1.0
    xent: Annotated[float, Field(ge=0), Finite] = 0.0
    normalize: StrictBool = True
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_a_loss(self) -> TransferConfig:
        if not (self.mse or self.xent):
            raise ValueError("mse and xent are both 0, which leaves nothing to learn")
        return self


class FinetuneConfig(_Section):
    """Stage 2, low-rank linearizing (SPEC 8): LoRA with next-token cross-entropy.

    Args:
        learning_rate: of AdamW, between warm-up and a cosine down to 0.
        batch_size: sequences of a forward pass.
        gradient_accumulation: forward passes of an optimizer step.
        epochs: passes over the data.
        max_steps: optimizer steps, instead of epochs.
        warmup: the share of the steps in which the learning rate rises.
        rank, alpha, dropout: of LoRA.
        target_modules: names of modules, the last parts of their paths; None for all linear layers
            of the attention modules, whatever a family calls them (Phi-3 has a fused qkv_proj).
        train_features: also train feature maps and gates.
        merge: fold the LoRA weights into the model.
        save_steps: optimizer steps between checkpoints, where there are any.
        seed: of the adapters, the order of the data and dropout.
    """

    learning_rate: Annotated[float, Field(gt=0), Finite] = 1e-4
    batch_size: Positive = 1
    gradient_accumulation: Positive = 8
    epochs: Positive = 2
    max_steps: Positive | None = None
    warmup: Annotated[float, Field(ge=0, lt=1), Finite] = 0.1
    rank: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1), Finite] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    train_features: StrictBool = False
    merge: StrictBool = True
    save_steps: Positive = 50
    seed: Seed = 0


def _attention(fields: Any) -> Any:
    """A LolcatsConfig of its own making: pydantic would turn True into a window of 1."""
    if not isinstance(fields, Mapping):
        return fields
    try:
        return LolcatsConfig.from_dict(fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


Config = TypeVar("Config", bound=_Section)


def checked(caller: str, config: Any, kind: type[Config]) -> Config:
    """``config``, or the defaults for None.

    Raises:
        TypeError: something else.
    """
    config = kind() if config is None else config
    if not isinstance(config, kind):
        raise TypeError(f"{caller}: config is a {type(config).__name__}, needs a {kind.__name__}")
    return config


def fields_of(*paths: Path | str, changes: Iterable[str] = ()) -> dict[str, Any]:
    """The fields that YAML files name, and on top of them those of `changes`, whose values are YAML
    as well. Of a field that several of them name the last one holds.

    Raises:
        ValueError: no YAML, no mapping of sections, or a change that is not of this form.

    >>> fields_of(changes=["lolcats.window=128", "finetune.target_modules=[q_proj, v_proj]"])
    {'lolcats': {'window': 128}, 'finetune': {'target_modules': ['q_proj', 'v_proj']}}
    """
    fields: dict[str, Any] = {}
    for path in paths:
        sections = _yaml(Path(path).read_bytes(), path)
        if not isinstance(sections, dict | None):
            raise ValueError(f"{path} is a {type(sections).__name__}, needs a mapping of sections")
        for section, named in (sections or {}).items():
            named = {} if named is None else named  # all of its fields are commented out
            within = fields.get(section)
            if isinstance(named, dict) and isinstance(within, dict):
                named = {**within, **named}
            fields[section] = named
    for change in changes:
        name, equals, value = change.partition("=")
        section, dot, field = name.partition(".")
        if not (section and dot and field and equals):
            raise ValueError(f"--set {change}: needs section.name=value, as in lolcats.window=128")
        within = {} if fields.get(section) is None else fields[section]
        if not isinstance(within, dict):
            raise ValueError(f"{section} is {within!r}, needs a mapping, for --set {change}")
        fields[section] = {**within, field: _yaml(value, f"--set {change}")}
    return fields


def _yaml(text: str | bytes, source: Path | str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date, say, that is none
        raise ValueError(f"{source} is not YAML: {error}") from error


class ConversionConfig(_Section):
    """Everything the commands read; one YAML file, saved with the model.

    >>> config = ConversionConfig(transfer=TransferConfig(epochs=2))
    >>> ConversionConfig.model_validate(config.model_dump()) == config
    True
    """

    lolcats: Annotated[LolcatsConfig, BeforeValidator(_attention)] = LolcatsConfig()
    data: DataConfig = DataConfig()
    transfer: TransferConfig = TransferConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @classmethod
    def load(cls, *paths: Path | str, changes: Iterable[str] = ()) -> ConversionConfig:
        """The fields of YAML files and changes to them, as in `fields_of`; the others take their
        defaults.

        Raises:
            ValueError: an unknown or invalid field, no mapping, or no YAML; it names the files and
                the changes, and the field.

        >>> ConversionConfig.load(changes=["transfer.epochs=2"]).transfer.epochs
        2
        """
        changes = list(changes)
        try:
            return cls.model_validate(fields_of(*paths, changes=changes))
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            sources = [*map(str, paths), *(f"--set {change}" for change in changes)]
            raise ValueError(f"{', '.join(sources)}: {'; '.join(wrong)}") from error

    def save(self, path: Path | str) -> None:
        """Writes all fields as YAML."""
        Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
