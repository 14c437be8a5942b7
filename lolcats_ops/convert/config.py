"""One configuration for a whole conversion: what the model becomes, and how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from lolcats_ops.hf import LolcatsConfig

Positive = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """How text becomes training sequences."""

    length: Positive = 1024  # tokens per packed sequence


class TransferConfig(_Section):
    """Stage 1, attention transfer (SPEC 7): each layer learns to imitate its softmax attention.

    A batch runs through the model once; inside each layer it is cut into micro-batches, one
    optimizer step each.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-2  # peak of OneCycle, as published
    batch_size: Positive = 8  # sequences per forward pass of the model
    micro_batch: Positive = 1  # sequences per optimizer step of a layer
    # Queries and keys do not depend on what is learned, so one forward pass can serve several
    # rounds of steps. More rounds cost less than more passes; they also see less text.
    rounds: Positive = 1
    epochs: Positive = 1
    mse: Annotated[float, Field(ge=0)] = 1.0
    xent: Annotated[float, Field(ge=0)] = 0.0
    normalize: bool = True  # mse / var(teacher): published errors of layers differ by up to 2400x
    seed: int = 0


class FinetuneConfig(_Section):
    """Stage 2, low-rank linearizing (SPEC 8): LoRA with next-token cross-entropy."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Positive = 1
    gradient_accumulation: Positive = 8
    epochs: Positive = 2
    max_steps: int = -1  # optimizer steps; overrides epochs where positive
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the steps
    rank: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    train_features: bool = False  # also train feature maps and gates
    merge: bool = True  # fold the LoRA weights into the model
    seed: int = 0


class ConversionConfig(_Section):
    """Everything the commands read; one YAML file, saved with the model.

    Example:
        >>> config = ConversionConfig(transfer=TransferConfig(epochs=2))
        >>> ConversionConfig.model_validate(config.model_dump()) == config
        True
    """

    lolcats: LolcatsConfig = LolcatsConfig()
    data: DataConfig = DataConfig()
    transfer: TransferConfig = TransferConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    @classmethod
    def load(cls, path: Path | str) -> ConversionConfig:
        """Reads a YAML file; missing fields take their defaults.

        Raises:
            ValueError: an unknown or invalid field (pydantic names it), no mapping, or no YAML.
        """
        try:
            fields = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        return cls.model_validate(fields or {})

    def save(self, path: Path | str) -> None:
        """Writes all fields as YAML."""
        Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
