"""The Triton operators as a GPU would run them: compiled, their PTX executed on the CPU.

Needs a process in which kernels are compiled, TRITON_INTERPRET=0; ``ptx_report`` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from gpu_on_cpu.compiler import driver_for
from gpu_on_cpu.launches import Launch, bind
from gpu_on_cpu.ptx import Fault
from gpu_on_cpu.ptx.report import Report, Traffic
from lolcats_ops.kernels.triton import launch

from lolcats_ops import dispatch

from .cases import Case
from .operators import attention_transfer, check, hybrid_attention, linear_attention


def _case(length: str, D: int, **settings: Any) -> Case:
    settings = {"window": 64, "batch": (1, 2), **settings}
    return Case(length, D=D, f=64, dtype=torch.bfloat16, **settings)


def _cases(D: int) -> dict[str, tuple[Callable, Case]]:
    return {
        f"hybrid sliding {D}": (hybrid_attention, _case("500", D)),
        f"hybrid terrace {D}": (hybrid_attention, _case("500", D, window_kind="terrace")),
        f"linear {D}": (linear_attention, _case("500", D, window=0)),
        f"transfer mse {D}": (attention_transfer, _case("3w+7", D)),
        f"transfer xent {D}": (attention_transfer, _case("3w+7", D, xent=True)),
    }


CASES = {
    **_cases(64),
    **_cases(128),
    "hybrid segmented": (hybrid_attention, _case("2048", 64, batch=(1, 1))),
    "linear segmented": (linear_attention, _case("2048", 64, window=0, batch=(1, 1))),
    "linear plain 128": (linear_attention, _case("500", 128, window=0, activation=None)),
    "linear plain 256": (linear_attention, _case("500", 256, window=0, activation=None)),
    "hybrid padded": (hybrid_attention, _case("3w+7", 64, packing="left", sink=1, G=2)),
    "hybrid wide values": (hybrid_attention, _case("3w+7", 64, V=72, window=48, affine=True)),
}


@contextmanager
def compiled_for(target: str, run: Callable[[Launch], None]) -> Iterator[None]:
    """Calls with ``backend="triton"`` on CPU tensors hand their launches, compiled, to ``run``."""

    def hook(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict) -> None:
        run(bind(kernel, grid, arguments, options))

    triton.runtime.driver.set_active(driver_for(target))
    with (
        mock.patch.object(launch, "_run", hook),
        mock.patch.object(dispatch, "_not_interpreted", return_value=None),
    ):
        yield


@dataclass(frozen=True)
class Run:
    """A launch, and what it did."""

    launch: Launch = field(repr=False)
    report: Report = field(repr=False)

    @property
    def findings(self) -> list[str]:
        """Races within a block and conflicts between blocks."""
        found = (*self.report.races, *self.report.block_conflicts)
        return [f"{self.launch.kernel}: {finding}" for finding in found]

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Of global memory, by tensor."""
        names = list(self.launch.arguments)
        return {names[n]: traffic for n, traffic in self.report.global_bytes.items()}

    @property
    def moved(self) -> dict[str, int]:
        """Bytes of global memory by tensor, in sectors of 32."""
        return {name: traffic.sectors for name, traffic in self.traffic.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the tensors that it touches: what moves if each is read or written once."""
        tensors, moved = self.launch.tensors, self.moved
        return {n: x.numel() * x.element_size() for n, x in tensors.items() if moved[n]}


def run_case(target: str, name: str) -> tuple[list[Run], str]:
    """A case of CASES, forward and backward: its launches, and how the results differ from the
    fp64 reference (SPEC 9), empty if they do not."""
    call, case = CASES[name]
    runs: list[Run] = []
    with compiled_for(target, lambda one: runs.append(Run(one, one.execute(check_blocks=True)))):
        try:
            check(call, case, "triton")
        except (AssertionError, Fault) as error:
            return runs, str(error)
    return runs, ""
