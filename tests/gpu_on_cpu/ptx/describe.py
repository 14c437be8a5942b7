"""What findings say: the machine's numbers as sentences."""

from __future__ import annotations

from collections.abc import Callable

from . import machine
from .report import Hazard

Text = Callable[[int], str]  # the instruction at a program counter


def describe(hazard: Hazard, finding: machine.Finding, text: Text) -> str:
    return _MESSAGES[hazard](finding, text)


def _race(f: machine.Finding, text: Text) -> str:
    return (
        f"warp {f.warp} {'writes' if f.writes else 'reads'} shared byte {f.address} by "
        f"{text(f.pc)}, warp {f.other_warp} {'wrote' if f.other_writes else 'read'} it by "
        f"{text(f.other_pc)}, no barrier in between, block {tuple(f.block)}"
    )


def _copy(f: machine.Finding, text: Text) -> str:
    return (
        f"warp {f.warp} {'writes' if f.writes else 'reads'} shared byte {f.address} by "
        f"{text(f.pc)}, where {text(f.other_pc)} has not been waited for"
    )


def _accumulator(f: machine.Finding, text: Text) -> str:
    role = "accumulators" if f.other_writes else "operands"
    return (
        f"warp {f.warp} {'writes' if f.writes else 'reads'} {role} of a wgmma that has not been "
        f"waited for, by {text(f.pc)}"
    )


def _operand(f: machine.Finding, text: Text) -> str:
    return (
        f"warp {f.warp} writes shared byte {f.address} by {text(f.pc)}, an operand of "
        f"{text(f.other_pc)}, which has not been waited for"
    )


def _fence(f: machine.Finding, text: Text) -> str:
    return (
        f"{text(f.pc)} reads shared byte {f.address}, which warp {f.other_warp} wrote by "
        f"{text(f.other_pc)}, without fence.proxy.async in between"
    )


def _unfinished(f: machine.Finding, text: Text) -> str:
    return f"warp {f.warp} exits and has not waited for {text(f.pc)}"


def _blocks(f: machine.Finding, text: Text) -> str:
    return (
        f"block {tuple(f.block)} {'writes' if f.writes else 'reads'} a byte of global memory by "
        f"{text(f.pc)} that block number {f.other_block} has "
        f"{'written' if f.other_writes else 'touched'}"
    )


_MESSAGES = {
    Hazard.RACE: _race,
    Hazard.COPY: _copy,
    Hazard.ACCUMULATOR: _accumulator,
    Hazard.OPERAND: _operand,
    Hazard.FENCE: _fence,
    Hazard.UNFINISHED: _unfinished,
    Hazard.DUPLICATE: _race,
    Hazard.BLOCKS: _blocks,
}
