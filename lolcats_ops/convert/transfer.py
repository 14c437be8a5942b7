"""Stage 1, attention transfer: every layer learns to imitate its own softmax attention (SPEC 7)."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats_ops.convert.config import TransferConfig
from lolcats_ops.convert.progress import Bar, progress
from lolcats_ops.hf import LolcatsAttention, attention_layers, use_mode
from lolcats_ops.hf.attention import Attend
from lolcats_ops.hf.patch import local_window

SAMPLE = 4096  # elements of a weight that tell models apart


@dataclass(frozen=True)
class TransferReport:
    """What stage 1 did; `losses[layer][step]` is mse / var(teacher), or mse without `normalize`."""

    losses: list[list[float]] = field(repr=False)
    parameters: int


class _LayerLearner:
    """Trains one layer inside the model's forward pass; its graph ends before the next layer."""

    def __init__(self, attention: LolcatsAttention, config: TransferConfig, steps: int, bar: Bar):
        parameters = list(attention.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.config = config
        self.bar = bar
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=config.learning_rate, total_steps=steps
        )

    def __call__(self, attend: Attend, batch: int) -> Tensor:
        size = self.config.micro_batch
        rows = [slice(i, i + size) for i in range(0, batch, size)]
        teacher = [self._step(attend, piece) for piece in rows]
        for _ in range(self.config.rounds - 1):
            for piece in rows:
                self._step(attend, piece)
        return torch.cat(teacher)

    def _step(self, attend: Attend, rows: slice) -> Tensor:
        with torch.enable_grad():
            teacher, mse, xent = attend(rows)
            teacher = teacher.detach()
            if self.config.normalize:
                mse = mse / teacher.float().var()
            loss = self.config.mse * mse
            if self.config.xent:
                loss = loss + self.config.xent * xent
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(mse.item())
        self.bar.advance(loss=self.losses[-1])
        return teacher

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def transfer(
    model: PreTrainedModel,
    data: Tensor,
    config: TransferConfig | None = None,
    *,
    checkpoint: Path | str | None = None,
) -> TransferReport:
    """Trains the feature maps and gates of a converted model on token rows, in place.

    The teacher's output flows from layer to layer, so layers are independent regressions: each one
    computes its loss, runs its backward and steps its optimizer inside the forward pass, and
    nothing is kept across layers. Memory is that of one layer, linear in T. The language model head
    is not run.

    Args:
        model: converted by `lo.hf.convert`.
        data: [N, T] token ids, N >= 1.
        config: batch sizes, learning rate, loss.
        checkpoint: a file written after every batch; if it exists, training goes on from it to the
            same result.

    Raises:
        ValueError: a model that is not converted, `data` of another shape, or a checkpoint of
            another model, of other data or of another configuration.

    Warns:
        UserWarning: rows longer than the sliding window that converted layers had: their teacher is
            attention to all earlier tokens, which the model has not been trained for.

    Example:
        >>> lo.hf.convert(model)  # doctest: +SKIP
        >>> report = transfer(model, pack(texts, tokenizer, 1024))  # doctest: +SKIP
    """
    config = config or TransferConfig()
    if data.dim() != 2 or not len(data):
        raise ValueError(
            f"transfer: data is {list(data.shape)}, needs [N, T] token ids with N >= 1"
        )
    window = local_window(model)
    if window is not None and data.shape[1] > window:
        warnings.warn(
            f"transfer: rows of {data.shape[1]} tokens are longer than the sliding window of "
            f"{window} that layers of this model had; their teacher attends all earlier tokens",
            stacklevel=2,
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.cat(
        [torch.randperm(len(data), generator=generator) for _ in range(config.epochs)]
    )
    batches = data[order].split(config.batch_size)
    steps = config.rounds * sum(-(-len(batch) // config.micro_batch) for batch in batches)
    training = model.training
    model.eval()
    with (
        use_mode(model, "transfer"),
        progress("attention transfer", steps * len(attention_layers(model))) as bar,
    ):
        layers = attention_layers(model)
        learners = [_LayerLearner(layer, config, steps, bar) for layer in layers]
        origin = {} if checkpoint is None else _origin(model, data, config)
        done = _resume(checkpoint, origin, layers, learners)
        bar.advance(sum(len(learner.losses) for learner in learners))
        try:
            for layer, learner in zip(layers, learners, strict=True):
                layer.learner = learner
            for i, batch in enumerate(batches[done:], done + 1):
                with torch.no_grad():
                    model.base_model(batch.to(model.device), use_cache=False)
                _save(checkpoint, origin, i, layers, learners)
        finally:
            for layer in layers:
                layer.learner = None
    model.train(training)
    return TransferReport(
        losses=[learner.losses for learner in learners],
        parameters=sum(p.numel() for layer in layers for p in layer.parameters()),
    )


def _origin(model: PreTrainedModel, data: Tensor, config: TransferConfig) -> dict[str, str]:
    """What decides the result, in digests: a checkpoint goes on with nothing else. Of large weights
    it is a sample."""

    def digest(*values: Any) -> str:
        found = hashlib.sha256()
        for value in values:
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            found.update(value if isinstance(value, bytes) else repr(value).encode())
        return found.hexdigest()

    named = model.named_parameters()
    frozen = [x.flatten() for name, x in named if ".lolcats." not in name and not x.is_meta]
    weights = [x[:: max(1, len(x) // SAMPLE)] for x in frozen]
    return {
        "model": digest(*(layer.config for layer in attention_layers(model)), *weights),
        "data": digest(list(data.shape), data),
        "configuration": digest(config.model_dump()),
    }


def _save(
    path: Path | str | None,
    origin: dict[str, str],
    done: int,
    layers: list[LolcatsAttention],
    learners: list[_LayerLearner],
) -> None:
    if path is None:
        return
    state = {
        "origin": origin,
        "batches": done,
        "layers": [layer.state_dict() for layer in layers],
        "learners": [learner.state_dict() for learner in learners],
    }
    partial = f"{path}.partial"
    torch.save(state, partial)
    os.replace(partial, path)  # an interrupted save leaves the previous one


def _resume(
    path: Path | str | None,
    origin: dict[str, str],
    layers: list[LolcatsAttention],
    learners: list[_LayerLearner],
) -> int:
    """Loads a checkpoint, if there is one, and returns how many batches it has seen."""
    if path is None or not Path(path).exists():
        return 0
    state = torch.load(path, map_location="cpu")  # from there to where the parameters are
    begun = state.get("origin", {})
    if others := [name for name, value in origin.items() if begun.get(name) != value]:
        was = f"was begun with another {' and another '.join(others)}"
        raise ValueError(
            f"transfer: {path} {was if begun else 'does not say what it was begun with'}; "
            "delete it, or keep the checkpoint elsewhere"
        )
    for layer, learner, weights, progress_ in zip(
        layers, learners, state["layers"], state["learners"], strict=True
    ):
        layer.load_state_dict(weights)
        learner.load_state_dict(progress_)
    return state["batches"]
