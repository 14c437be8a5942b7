"""Data parallelism: torchrun starts processes, and each takes its share of the rows. Accelerate
brings them together, as it does for the Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn


def processes(device: torch.device | str | None = None) -> tuple[int, int]:
    """The index of this process, and the count of those that torchrun has started; they meet in the
    first call. One that is alone has nothing to do with accelerate.

    Args:
        device: where the model is, or None for where the Trainer puts it.

    Raises:
        RuntimeError: accelerate has been told of others than there are.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched == 1 and not _meet():
        return 0, 1
    state = PartialState(cpu=on_cpu() if device is None else str(device).split(":")[0] == "cpu")
    met = torch.distributed.get_world_size() if _meet() else 1
    if not state.num_processes == met == max(met, launched):
        raise RuntimeError(
            f"of {max(met, launched)} processes {met} have met, and accelerate knows of "
            f"{state.num_processes}: start them by torchrun, without an Accelerator for another "
            "device before, and without destroying their group"
        )
    return state.process_index, state.num_processes


def part() -> None:
    """Ends what `processes` began; the next call begins anew."""
    if _meet():
        PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # which would still tell of it


def _meet() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def on_cpu() -> bool:
    """Whether the Trainer stays on the CPU, where it brings processes together only if told so."""
    return not torch.accelerator.is_available()


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return not _meet() or torch.distributed.get_rank() == 0


def refuse_discord(caller: str, begun: Mapping[str, str], count: int) -> None:
    """Compares what ``count`` processes begin with; each has to call it.

    Raises:
        ValueError: naming what differs.
    """
    everywhere = gather_object([dict(begun)]) if count > 1 else []
    if others := [name for name in begun if any(b[name] != begun[name] for b in everywhere)]:
        raise ValueError(
            f"{caller}: the {count} processes have different {' and '.join(others)}; all begin "
            "with the same, and each takes its share of the rows"
        )


def share(rows: Tensor, index: int, count: int) -> Tensor:
    """The rows of process ``index`` of ``count``, dealt out in turns. All have as many: where the
    last turn is not full, the first rows come again.

    >>> [share(torch.arange(5), index, 2).tolist() for index in range(2)]
    [[0, 2, 4], [1, 3, 0]]
    """
    turns = -(-len(rows) // count)
    return rows[(torch.arange(turns) * count + index) % len(rows)]


def same_everywhere(module: nn.Module, count: int) -> None:
    """Gives ``count`` processes the first one's parameters and buffers, in place."""
    if count > 1:
        broadcast([x.data for x in (*module.parameters(), *module.buffers())])


def mean_gradients(parameters: Sequence[Tensor], loss: Tensor, count: int) -> Tensor:
    """Puts the mean over ``count`` processes into each gradient and returns that of ``loss``."""
    if count > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")
        loss = reduce(loss.detach(), "mean")
    return loss
