"""Stage 2, low-rank linearizing (SPEC 8): LoRA with the Hugging Face Trainer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from lolcats_ops.convert.config import FinetuneConfig
from lolcats_ops.convert.progress import Bar, progress
from lolcats_ops.hf import attention_layers


@dataclass(frozen=True)
class FinetuneReport:
    """What stage 2 did; `model` has the adapters merged in, or is a PeftModel without `merge`.

    `losses` are of the steps of this call: none if a resumed run was done already.
    """

    model: Any = field(repr=False)
    losses: list[float] = field(repr=False)
    parameters: int


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class _Report(transformers.TrainerCallback):
    def __init__(self, bar: Bar):
        self.bar = bar
        self.losses: list[float] = []

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.bar.advance(loss=self.losses[-1])


def finetune(
    model: PreTrainedModel,
    data: Tensor,
    config: FinetuneConfig | None = None,
    *,
    output_dir: Path | str | None = None,
    resume: bool = False,
    description: str = "LoRA",
) -> FinetuneReport:
    """Trains LoRA adapters on token rows by next-token cross-entropy.

    Works on an unconverted model as well (for comparison). Feature maps and gates stay frozen
    unless `config.train_features`.

    Args:
        model: a causal language model, changed in place.
        data: [N, T] token ids, N >= 1.
        output_dir: where the Trainer writes its checkpoints, once per epoch; none are written
            without it.
        resume: go on from the last of those, if there is one.

    Raises:
        ValueError: `data` of another shape, no module named in `config.target_modules`, or features
            to train in a model that is not converted.

    Example:
        >>> model = finetune(model, rows, FinetuneConfig(max_steps=20)).model  # doctest: +SKIP
    """
    config = config or FinetuneConfig()
    if data.dim() != 2 or not len(data):
        raise ValueError(
            f"finetune: data is {list(data.shape)}, needs [N, T] token ids with N >= 1"
        )
    if config.train_features and not attention_layers(model):
        raise ValueError("finetune: train_features=True, but the model is not converted")
    transformers.set_seed(config.seed)  # before the adapters are drawn
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            # As PEFT's own, trained features are in every checkpoint and adapter that is saved.
            modules_to_save=["lolcats"] if config.train_features else None,
            task_type="CAUSAL_LM",
        ),
    )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=str(output_dir or scratch),
            save_strategy="epoch" if output_dir else "no",
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup,
            weight_decay=0.0,
            logging_steps=1,
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=True,
            report_to="none",
            seed=config.seed,
        )
        cached = model.config.use_cache  # the Trainer clears it
        try:
            losses = _train(adapted, arguments, data, resume, description)
        finally:
            model.config.use_cache = cached
    return FinetuneReport(
        model=adapted.merge_and_unload() if config.merge else adapted,
        losses=losses,
        parameters=trainable,
    )


def _check_adapter(path: str, now: peft.LoraConfig) -> None:
    """Refuses to go on from the checkpoint of another kind of adapter."""
    begun = peft.PeftConfig.from_pretrained(path)

    def value(config: Any, name: str) -> Any:
        x = getattr(config, name)
        return sorted(x) if isinstance(x, (list, set, tuple)) else x

    for name in ("r", "lora_alpha", "target_modules", "modules_to_save"):
        if value(begun, name) != value(now, name):
            raise ValueError(
                f"finetune: {path} was begun with {name}={value(begun, name)}, not "
                f"{value(now, name)}; delete it, or keep the checkpoints elsewhere"
            )


def _train(model: Any, arguments: Any, data: Tensor, resume: bool, description: str) -> list[float]:
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Rows(data))
    trainer.remove_callback(transformers.PrinterCallback)  # our bar shows the loss
    per_epoch = max(
        1,
        -(
            -len(data)
            // (arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps)
        ),
    )
    steps = (
        arguments.max_steps
        if arguments.max_steps > 0
        else int(arguments.num_train_epochs * per_epoch)
    )
    last = get_last_checkpoint(arguments.output_dir) if resume else None
    if last is not None:
        _check_adapter(last, model.peft_config["default"])
    if last is not None and int(last.rpartition("-")[2]) >= steps:  # the Trainer would go on
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(last))
        return []
    with progress(description, steps) as bar:
        report = _Report(bar)
        trainer.add_callback(report)
        trainer.train(resume_from_checkpoint=last)
    return report.losses
