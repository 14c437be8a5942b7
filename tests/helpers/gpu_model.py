"""Cycles and bytes of the Triton operators on GPUs that have not run them: renews what bench reads.

    TRITON_INTERPRET=0 PYTHONPATH=tests:. python -m helpers.gpu_model

Compiles every case for every target, runs its PTX on the CPU to see how often each loop is
executed, and counts what the machine code then needs of each pipe (gpu_on_cpu/pipe_model.py).
Writes bench/gpu_model.json and, from that, docs/gpu_model.md.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from gpu_on_cpu import sass
from gpu_on_cpu.launches import Launch
from gpu_on_cpu.pipe_model import MULTIPROCESSORS, pipes_of, trip
from lolcats_ops.kernels import triton as kernels

from bench import gpu_model, gpu_model_page

from .compiled import CASES, Run, compiled_for, run_case

PASSES = {
    "attention_forward": "forward",
    "backward_queries": "backward",
    "backward_keys": "backward",
}
WINDOW = 64
SEQUENCES, HEADS = 4, 8  # of a step


def streamed(run: Run, tokens: int, amounts: dict[str, int]) -> int:
    """Bytes of the tensors that hold something for every token: no others have a multiple of
    ``tokens`` elements."""
    tensors = run.launch.tensors
    return sum(n for name, n in amounts.items() if tensors[name].numel() % tokens == 0)


def walk(target: str, run: Run, rows: int, tokens: int) -> dict[str, Any]:
    """A kernel that walks the chunks of ``rows`` sequences and heads: what a chunk takes."""
    launch = run.launch
    listing = sass.read_cubin(launch.compiled.asm["cubin"]).listing
    warps, programs = launch.compiled.metadata.num_warps, launch.grid[0]
    opcodes, trips = trip(listing, run.report.executed)
    chunk = -(-tokens * warps * programs // trips)
    return {
        "kernel": launch.kernel,
        "chunk": 1 << (chunk - 1).bit_length(),
        "programs": programs // rows,
        "cycles": pipes_of(opcodes, target, warps),
        "bytes": streamed(run, tokens, run.sizes) / (tokens * rows),
        "requested": streamed(run, tokens, run.moved) / (tokens * rows),
    }


def step(target: str, kind: int, D: int) -> dict[str, Any]:
    """One token on states whose windows are full. There are no matrix instructions that would tell
    the trips of loops: the PTX's instructions are counted."""
    q = torch.zeros(SEQUENCES, HEADS, 1, D, dtype=torch.bfloat16)
    weight, gate = torch.zeros(HEADS, D, 64), torch.zeros(HEADS)
    ring = WINDOW * (1 + kind)
    rings = [torch.zeros(SEQUENCES, HEADS, n, D, dtype=torch.bfloat16) for n in (ring, ring, 0, 0)]
    state = torch.zeros(SEQUENCES, HEADS, 128, D), torch.zeros(SEQUENCES, HEADS, 128)
    length = torch.full((SEQUENCES,), 4 * WINDOW), torch.full((SEQUENCES,), 4 * WINDOW - ring)
    runs: list[Run] = []

    def keep(launch: Launch) -> None:
        runs.append(Run(launch, launch.execute()))

    with compiled_for(target, keep):
        kernels.hybrid_attention_step_(
            q, q, q, weight, None, weight, None, gate, *state, *rings, *length, None, None, None,
            WINDOW, kind, D**-0.5, False, 0, True, False, 1e-12,
        )  # fmt: skip
    (run,) = runs
    rows, programs = SEQUENCES * HEADS, run.launch.grid[0]
    issued = sum(n for _, n in run.report.executed) / programs
    once = 0  # what is loaded and what is stored, each at most once
    for name, traffic in run.traffic.items():
        size = run.sizes.get(name, 0)
        once += min(size, traffic.loaded_sectors) + min(size, traffic.stored_sectors)
    return {
        "kernel": run.launch.kernel,
        "chunk": 0,
        "programs": programs // rows,
        "cycles": {"issue": issued / MULTIPROCESSORS[target].issued_warps},
        "bytes": once / rows,
        "requested": sum(run.moved.values()) / rows,
    }


def cases(target: str) -> dict[str, list[dict[str, Any]]]:
    result: dict[str, list[dict[str, Any]]] = {}
    for D in (64, 128):
        for code, kind in enumerate(("sliding", "terrace")):
            name = f"hybrid {kind} {D}"
            case = CASES[name][1]
            runs, wrong = run_case(target, name)
            assert not wrong, wrong
            rows = case.batch[0] * case.batch[1] * case.G
            for run in runs:
                key = f"{PASSES[run.launch.kernel]} {kind} {D}"
                result.setdefault(key, []).append(walk(target, run, rows, case.T))
            result[f"step {kind} {D}"] = [step(target, code, D)]
            print(target, name, flush=True)
    return result


def main() -> None:
    torch.set_num_threads(1)
    targets = {
        target: {"name": sm.name, "multiprocessors": sm.count, "clock": sm.clock,
                 "bandwidth": sm.bandwidth}
        for target, sm in MULTIPROCESSORS.items()
    }  # fmt: skip
    document = {
        "label": gpu_model.LABEL,
        "targets": targets,
        "cases": {target: cases(target) for target in targets},
    }
    text = json.dumps(document, indent=1, default=float)
    gpu_model.DATA.write_text(text + "\n")
    gpu_model.model.cache_clear()
    gpu_model_page.PAGE.write_text(gpu_model_page.page())


if __name__ == "__main__":
    main()
