"""Stage 2, low-rank linearizing (SPEC 8): LoRA with the Hugging Face Trainer."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError  # type: ignore[import-not-found]
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats_ops.convert.config import FinetuneConfig, checked
from lolcats_ops.convert.data import refuse_offloaded, refuse_sharded, token_rows
from lolcats_ops.convert.files import is_whole, replacing
from lolcats_ops.convert.origin import origin, refuse_others
from lolcats_ops.convert.processes import on_cpu, processes, refuse_discord
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
            if not math.isfinite(self.losses[-1]):
                raise RuntimeError(
                    f"finetune: the loss of step {state.global_step} is {self.losses[-1]}; the "
                    f"learning rate of {args.learning_rate:g} may be too large"
                )


@torch.inference_mode(False)  # tensors made under inference mode have no gradient
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
    unless `config.train_features`. The model comes back in the mode, train or eval, that it came
    in, and once merged with the same parameters trainable; on any exception it is as it was, but
    for the device, which the Trainer chooses.

    Under torchrun it is data parallel: a step takes `batch_size * gradient_accumulation` rows of
    each process. All processes call it, with the same data.

    Args:
        model: a causal language model, changed in place.
        data: [N, T] token ids of the model's vocabulary, any integer dtype, N >= 1 and T >= 2.
        config: batch sizes, learning rate, adapters; None for the defaults.
        output_dir: where the Trainer writes its checkpoints, every `config.save_steps` steps and at
            the end, of which it keeps two, beside `origin.json`, which says what they were begun
            with; none are written without it.
        resume: go on from the last whole one of those, if there is one, to the same result.
        description: what the progress bar is called.

    Raises:
        TypeError: `data` is no integer tensor; `model` is a wrapper of one.
        ValueError: `data` of another shape or with ids beyond the vocabulary, a name in
            `config.target_modules` that no module has, features to train in a model that is not
            converted, an `output_dir` with checkpoints of another model, of other data, of another
            configuration (`merge` and `save_steps` aside) or of another number of processes, or
            processes that differ in one of these; a model with adapters, or with weights that are
            offloaded or sharded.
        RuntimeError: a loss that is not finite; processes that accelerate was not told of.
        OSError: a checkpoint that cannot be written, such as on a full disk.

    Warns:
        UserWarning: a checkpoint that was not written to its end, which is passed over.

    >>> model = finetune(model, rows, FinetuneConfig(max_steps=20)).model  # doctest: +SKIP
    """
    config = checked("finetune", config, FinetuneConfig)
    data = token_rows("finetune", data, model, 2)
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "finetune: model is made by torch.compile, whose arguments the Trainer cannot see: "
            "pass the model itself, which model.compile() compiles in place"
        )
    if resume and not output_dir:
        raise ValueError("finetune: resume=True without an output_dir, which has the checkpoints")
    if getattr(model, "peft_config", None):
        raise ValueError(
            "finetune: the model has adapters (PEFT); merge_and_unload() them first, or unload()"
        )
    if config.train_features and not attention_layers(model):
        raise ValueError("finetune: train_features=True, but the model is not converted")
    refuse_offloaded("finetune", (name for name, p in model.named_parameters() if p.is_meta))
    refuse_sharded("finetune", model)
    targets = _targets(model, config)
    if config.merge:
        _refuse_tied(model, targets)
    last, (_, count) = None, processes()
    used = {**config.model_dump(exclude={"merge", "save_steps"}), "target_modules": targets}
    modes = [layer.mode for layer in attention_layers(model)]
    others = {"number of processes": count, "mode of converted layers": modes}
    begun = origin(model, data, used, others, features=True)
    if output_dir:
        last = _begin(Path(output_dir), begun, resume, count)
    refuse_discord("finetune", {**begun, "checkpoint": str(last and last.name)}, count)
    training = model.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    transformers.set_seed(config.seed)  # before the adapters are drawn
    with _undone_on_error(model), tempfile.TemporaryDirectory() as scratch:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                # As PEFT's own, trained features are in every checkpoint and adapter that is saved.
                modules_to_save=["lolcats"] if config.train_features else None,
                task_type="CAUSAL_LM",
            ),
        )
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        arguments = transformers.TrainingArguments(
            output_dir=str(output_dir or scratch),
            use_cpu=count > 1 and on_cpu(),
            save_strategy="steps" if output_dir else "no",
            save_steps=config.save_steps,
            save_total_limit=2,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            num_train_epochs=config.epochs,
            max_steps=config.max_steps or -1,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup,
            weight_decay=0.0,
            logging_steps=1,
            logging_nan_inf_filter=False,  # which would show them as 0
            dataloader_pin_memory=torch.accelerator.is_available(),
            disable_tqdm=True,
            report_to="none",
            seed=config.seed,
        )
        losses = _train(adapted, arguments, data, last, description)
        tuned = adapted
        if config.merge:
            tuned = adapted.merge_and_unload()
            for name, parameter in tuned.named_parameters():
                parameter.requires_grad_(name in trained)
        return FinetuneReport(model=tuned.train(training), losses=losses, parameters=trainable)


def _targets(model: nn.Module, config: FinetuneConfig) -> list[str]:
    """The paths of the modules to adapt; names would be those of others as well, such as gate_proj
    of an MLP beside that of attention."""
    modules = dict(model.named_modules())
    attention = [
        (path, name)
        for path, module in modules.items()
        if hasattr(module, "o_proj")
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    given = config.target_modules
    if given is None:
        given = tuple(f"{path}.{name}".removeprefix(".") for path, name in attention)
    found = {name: [p for p in modules if f".{p}".endswith(f".{name}")] for name in given}
    missing = sorted(name for name, paths in found.items() if not paths)  # PEFT wants one of them
    if missing or not given:
        have = sorted({name for _, name in attention})
        raise ValueError(
            f"finetune: target_modules={missing or None} names no module; the attention "
            f"modules (those with an o_proj) have the linear layers {have}"
        )
    return [path for path in modules if any(path in paths for paths in found.values())]


def _refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """Raises ValueError where a target's weight is another module's as well."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    for paths in owners.values():
        if len(paths) > 1 and not set(paths).isdisjoint(targets):
            raise ValueError(
                f"finetune: target_modules has one of {', '.join(paths)}, whose weights are the "
                "same tensor: merging its adapter would change the others as well. Leave it out, "
                "set merge to False, or untie them (config.tie_word_embeddings=False)"
            )


def _begin(folder: Path, now: dict[str, str], resume: bool, count: int) -> Path | None:
    """The checkpoint to go on from. If there is none, `folder` then says what was begun in it."""
    begun = folder / "origin.json"
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    checkpoints = sorted(found, key=_step, reverse=True)
    if checkpoints:  # of a new run as well: the next one would go on from them
        said = json.loads(begun.read_bytes()) if is_whole(begun) else {}
        refuse_others("finetune", folder, said, now)
    for path in checkpoints if resume else ():
        names = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"]
        names += [f"rng_state_{i}.pth" for i in range(count) if count > 1]
        files = {*(path / name for name in names), *path.glob("rng_state*")}
        if all(is_whole(file) for file in [*files, path / "trainer_state.json"]):
            return path
        warnings.warn(f"finetune: {path} is incomplete, and passed over", stacklevel=4)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(begun) as file:
        file.write(json.dumps(now).encode())
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def _undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Takes adapters back on any exception. PEFT's `unload` would keep trained copies of features,
    and cannot be had before all of the model is wrapped."""
    children = [(module, dict(module.named_children())) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training, cached = model.training, model.config.use_cache
    try:
        yield
    except BaseException:
        for module, own in children:
            for name, child in own.items():
                setattr(module, name, child)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        vars(model).pop("peft_config", None)
        model.train(training)
        raise
    finally:
        model.config.use_cache = cached  # the Trainer clears it


def _train(
    model: Any, arguments: Any, data: Tensor, last: Path | None, description: str
) -> list[float]:
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=_Rows(data))
    trainer.remove_callback(transformers.PrinterCallback)  # our bar shows the loss
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = int(arguments.num_train_epochs * math.ceil(len(data) / rows))
    if arguments.max_steps > 0:
        steps = arguments.max_steps
    if last is not None and _step(last) >= steps:  # the Trainer would go on
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(last)))
        return []
    with progress(description, steps) as bar:
        report = _Report(bar)
        trainer.add_callback(report)
        if last is not None:
            bar.advance(_step(last))
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except (OSError, RuntimeError, SafetensorError) as error:
            _refuse_half(Path(arguments.output_dir), trainer.state.global_step, error)
            raise
    return report.losses


def _refuse_half(folder: Path, step: int, error: Exception) -> None:
    """Raises OSError, and deletes the checkpoint, where writing it was what failed: torch and
    safetensors name neither a file nor the reason, such as a full disk."""
    checkpoint = folder / f"checkpoint-{step}"
    if not checkpoint.exists() or is_whole(checkpoint / "trainer_state.json"):
        return
    free = shutil.disk_usage(folder).free
    shutil.rmtree(checkpoint, ignore_errors=True)
    raise OSError(
        f"finetune: {checkpoint} could not be written, with {free} bytes free there: {error}"
    ) from error
