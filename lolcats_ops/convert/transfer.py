"""Stage 1, attention transfer: every layer learns to imitate its own softmax attention (SPEC 7)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats_ops.convert.config import TransferConfig, checked
from lolcats_ops.convert.data import input_device, refuse_offloaded, refuse_sharded, token_rows
from lolcats_ops.convert.files import replacing
from lolcats_ops.convert.origin import origin, refuse_others
from lolcats_ops.convert.processes import (
    is_main,
    mean_gradients,
    processes,
    refuse_discord,
    same_everywhere,
    share,
)
from lolcats_ops.convert.progress import Bar, progress
from lolcats_ops.hf import LolcatsAttention, attention_layers, use_mode
from lolcats_ops.hf.attention import Attend
from lolcats_ops.hf.patch import local_window
from lolcats_ops.state import window_start


@dataclass(frozen=True)
class TransferReport:
    """What stage 1 did; `losses[layer][step]` is mse / var(teacher), or mse without `normalize`."""

    losses: list[list[float]] = field(repr=False)
    parameters: int


class _LayerLearner:
    """Trains one layer inside the model's forward pass; its graph ends before the next layer."""

    def __init__(
        self,
        attention: LolcatsAttention,
        index: int,
        config: TransferConfig,
        steps: int,
        bar: Bar,
        count: int,
    ):
        self.parameters = list(attention.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        same_everywhere(attention, count)
        self.index = index  # among the model's layers that are converted
        self.config = config
        self.bar = bar
        self.count = count  # of processes
        self.losses: list[float] = []
        self.has_seen_batch = False
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=0.0
        )
        self.optimizer.zero_grad()  # of what was computed before
        # Of a cycle of a single step that would be the last, of a rate near zero, not the first.
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=config.learning_rate, total_steps=max(steps, 2)
        )

    def __call__(self, attend: Attend, batch: int) -> Tensor:
        if self.has_seen_batch:
            raise NotImplementedError(
                "transfer: this model applies a layer several times in one forward pass"
            )
        self.has_seen_batch = True
        size = self.config.micro_batch
        rows = [slice(i, i + size) for i in range(0, batch, size)]
        teacher = [self._step(attend, piece) for piece in rows]
        for _ in range(self.config.rounds - 1):
            for piece in rows:
                self._step(attend, piece)
        return torch.cat(teacher)

    def _step(self, attend: Attend, rows: slice) -> Tensor:
        with torch.enable_grad():
            teacher, mse, xent = attend(rows, xent=self.config.xent > 0)
            teacher = teacher.detach()
            if self.config.normalize:
                variance = teacher.float().var()
                mse = mse / variance.where(variance > 0, 1)  # a pruned layer's teacher is 0
            loss = self.config.mse * mse + self.config.xent * xent
        loss.backward()
        mse = mean_gradients(self.parameters, mse, self.count)
        losses = torch.stack((mse, loss)).tolist()
        if not all(map(math.isfinite, losses)):
            raise RuntimeError(
                f"transfer: the loss of converted layer {self.index} is {losses[1]} in step "
                f"{len(self.losses) + 1}: the model's weights or activations are not finite there, "
                f"or the learning rate of {self.config.learning_rate:g} is too large"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(losses[0])
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


@torch.inference_mode(False)  # tensors made under inference mode have no gradient
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
    is not run. An exception leaves features half trained, and the model in the modes that it had.

    Under torchrun it is data parallel: a step takes `micro_batch` rows of each process, whose model
    is on a device of its own, and the mean of their gradients. All processes call it, with the same
    data.

    Args:
        model: converted by `lo.hf.convert`.
        data: [N, T] token ids of the model's vocabulary, any integer dtype, N >= 1; padding would
            be learned from like text.
        config: batch sizes, learning rate, loss.
        checkpoint: a file written after every batch; if it exists, training goes on from it to the
            same result. All processes read it, the first one writes it.

    Raises:
        TypeError: `data` is no integer tensor; `model` is a wrapper without its methods.
        ValueError: a model that is not converted, or whose parameters are offloaded or sharded,
            `data` of another shape or with ids beyond the vocabulary, or a checkpoint that cannot
            be read, or that is of another model, of other data, of another configuration or of
            another number of processes; or processes that differ in one of these.
        NotImplementedError: a model that applies a layer several times.
        RuntimeError: processes that accelerate was not told of; a loss that is not finite.
        OSError: a checkpoint that cannot be written, such as in a folder that does not exist.

    Warns:
        UserWarning: rows longer than the sliding window that converted layers had: their teacher is
            attention to all earlier tokens, which the model has not been trained for; or rows so
            short that the window holds all of them.

    >>> lo.hf.convert(model)  # doctest: +SKIP
    >>> report = transfer(model, pack(texts, tokenizer, 1024))  # doctest: +SKIP
    """
    config = checked("transfer", config, TransferConfig)
    data = token_rows("transfer", data, model)
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise FileNotFoundError(f"transfer: checkpoint={checkpoint} is in no folder that exists")
    parameters = dict(model.named_parameters())
    refuse_offloaded(
        "transfer", (n for n, p in parameters.items() if p.is_meta and ".lolcats." in n)
    )
    refuse_sharded("transfer", model)
    window = local_window(model)
    if window is not None and data.shape[1] > window:
        warnings.warn(
            f"transfer: rows of {data.shape[1]} tokens are longer than the sliding window of "
            f"{window} that layers of this model had; their teacher attends all earlier tokens",
            stacklevel=3,
        )
    own = attention_layers(model)[0].config
    if window_start(torch.tensor(data.shape[1] - 1), own.window, own.window_kind) <= own.sink:
        warnings.warn(
            f"transfer: rows of {data.shape[1]} tokens lie within the window of {own.window} and "
            f"the {own.sink} sinks: no key is left to the features, so nothing is learned",
            stacklevel=3,
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.cat(
        [torch.randperm(len(data), generator=generator) for _ in range(config.epochs)]
    )
    index, count = processes(input_device(model))
    batches = data[share(order, index, count)].split(config.batch_size)
    steps = config.rounds * sum(-(-len(batch) // config.micro_batch) for batch in batches)
    with (
        use_mode(model, "transfer"),
        progress("attention transfer", steps * len(attention_layers(model))) as bar,
    ):
        layers = attention_layers(model)
        learners = [
            _LayerLearner(layer, i, config, steps, bar, count) for i, layer in enumerate(layers)
        ]
        others = {"number of processes": count}
        begun = origin(model, data, config.model_dump(), others, features=False)
        done = _resume(checkpoint, begun, layers, learners)
        refuse_discord("transfer", {**begun, "checkpoint": str(done)}, count)
        bar.advance(sum(len(learner.losses) for learner in learners))
        training = model.training
        try:
            model.eval()
            for layer, learner in zip(layers, learners, strict=True):
                layer.learner = learner
            for i, batch in enumerate(batches[done:], done + 1):
                for learner in learners:
                    learner.has_seen_batch = False
                with torch.no_grad():
                    model.base_model(batch.to(input_device(model)), use_cache=False)
                _save(checkpoint, begun, i, layers, learners)
        finally:
            for layer in layers:
                layer.learner = None
            model.train(training)
    return TransferReport(
        losses=[learner.losses for learner in learners],
        parameters=sum(p.numel() for layer in layers for p in layer.parameters()),
    )


def _save(
    path: Path | str | None,
    begun: dict[str, str],
    done: int,
    layers: list[LolcatsAttention],
    learners: list[_LayerLearner],
) -> None:
    if path is None or not is_main():
        return
    state = {
        "origin": begun,
        "batches": done,
        "layers": [layer.state_dict() for layer in layers],
        "learners": [learner.state_dict() for learner in learners],
    }
    with replacing(path) as file:
        torch.save(state, file)


def _resume(
    path: Path | str | None,
    now: dict[str, str],
    layers: list[LolcatsAttention],
    learners: list[_LayerLearner],
) -> int:
    """Loads a checkpoint, if there is one, and returns how many batches it has seen."""
    if path is None or not Path(path).exists():
        return 0
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu")  # from there to where the parameters are
        except Exception as error:  # what torch makes of other bytes: EOFError, struct.error, ...
            raise ValueError(
                f"transfer: {path} is no whole checkpoint ({type(error).__name__}); delete it"
            ) from error
    begun = state.get("origin", {}) if isinstance(state, dict) else {}
    refuse_others("transfer", path, begun, now)
    for layer, learner, weights, progress_ in zip(
        layers, learners, state["layers"], state["learners"], strict=True
    ):
        layer.load_state_dict(weights)
        learner.load_state_dict(progress_)
    return state["batches"]
