"""Bugs planted in the PTX of the operators' kernels, and what the machine notices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from gpu_on_cpu.launches import Launch
from gpu_on_cpu.ptx import Fault

import lolcats_ops

from .cases import make_inputs
from .compiled import CASES, compiled_for
from .operators import attention_transfer

BARRIER = r"bar\.sync\s+0;"
BARRIERS = 4  # of a kernel, that many deleted one at a time
AFTER = r"setp\.lt\.u32(?=\s+%p\d+, %r\d+, %r)"  # i < j, of the keys that are left out
WAIT = r"(?:cp\.async\.wait_group|wgmma\.wait_group\.sync\.aligned)\s+\d+;"


def without(ptx: str, pattern: str, which: int) -> str:
    """PTX without one of the statements that match."""
    match = list(re.finditer(pattern, ptx))[which]
    return ptx[: match.start()] + ptx[match.end() :]


def forward_bugs(ptx: str) -> Iterator[tuple[str, str]]:
    """(what it is, PTX of attention_forward with it)."""
    barriers = len(re.findall(BARRIER, ptx))
    for n in range(0, barriers, -(-barriers // BARRIERS)):
        yield f"barrier {n} deleted", without(ptx, BARRIER, n)
    yield "mask: i >= j is i > j", re.sub(AFTER, "setp.le.u32", ptx)
    yield "mask: i < T is i <= T", ptx.replace("setp.lt.s32", "setp.le.s32")


def compare_bugs(ptx: str) -> Iterator[tuple[str, str]]:
    """The same of attention_transfer's compare, whose loads are asynchronous."""
    for n in range(len(re.findall(WAIT, ptx))):
        yield f"wait {n} deleted", without(ptx, WAIT, n)


BUGS = {"attention_forward": forward_bugs, "compare": compare_bugs}


def notice(launch: Launch, ptx: str, before: Mapping, after: Mapping) -> str:
    """What shows when a launch runs other PTX; empty if nothing does."""
    tensors = {name: x.clone() for name, x in before.items()}
    try:
        report = launch.execute(ptx, tensors)
    except Fault as fault:
        return f"fault: {fault}"
    if report.races:
        return f"race: {report.races[0]}"
    wrong = [name for name, x in tensors.items() if not torch.equal(x, after[name])]
    return f"wrong: {', '.join(wrong)}" if wrong else ""


def noticed(target: str) -> dict[str, str]:
    """What is noticed of every bug, by kernel and bug."""
    result: dict[str, str] = {}

    def run(launch: Launch) -> None:
        before = {name: x.clone() for name, x in launch.tensors.items()}
        launch.execute()
        if launch.kernel in BUGS:
            for bug, ptx in BUGS[launch.kernel](launch.compiled.asm["ptx"]):
                found = notice(launch, ptx, before, launch.tensors)
                result[f"{launch.kernel}, {bug}"] = found

    case = replace(CASES["transfer xent 64"][1], length="w+1")
    inputs = make_inputs(case).as_dtype(case.dtype, "plain")
    with compiled_for(target, run), torch.no_grad():
        attention_transfer(lolcats_ops, inputs, backend="triton")
    return result
