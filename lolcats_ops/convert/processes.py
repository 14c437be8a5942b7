"""Data parallelism: torchrun or accelerate launch starts processes, and each takes its share of the
rows. Accelerate brings them together, as it does for the Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor


def processes(device: torch.device | str | None = None) -> PartialState:
    """All of them, met in the first call; this one alone where no launcher has started it.

    Args:
        device: where the model is, or None for where the Trainer puts it.
    """
    return PartialState(cpu=on_cpu() if device is None else str(device).split(":")[0] == "cpu")


def on_cpu() -> bool:
    """Whether the Trainer is to stay on the CPU: unless told so, it brings no processes together
    there."""
    return not torch.accelerator.is_available()


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return alone or torch.distributed.get_rank() == 0


def share(rows: Tensor, index: int, count: int) -> Tensor:
    """The rows of process ``index`` of ``count``, dealt out in turns. All have as many: where the
    last turn is not full, the first rows come again.

    >>> [share(torch.arange(5), index, 2).tolist() for index in range(2)]
    [[0, 2, 4], [1, 3, 0]]
    """
    turns = -(-len(rows) // count)
    return rows[(torch.arange(turns) * count + index) % len(rows)]


def same_everywhere(parameters: Sequence[Tensor]) -> None:
    """Gives all processes the first one's values, in place."""
    broadcast([parameter.data for parameter in parameters])


def mean_gradients(parameters: Sequence[Tensor], loss: Tensor, state: PartialState) -> Tensor:
    """Puts the mean over processes into each gradient and returns that of ``loss``."""
    if state.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")
        loss = reduce(loss.detach(), "mean")
    return loss
