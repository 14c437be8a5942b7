"""NVRTC, and nvcc where it is installed, keep the CUDA kernels within a budget; NVRTC's PTX is run
on the CPU and its bytes are counted.

UPDATE_CUDA_BUDGET=1 python -m pytest tests/test_cuda_compiles.py -k budget renews
tests/budgets/cuda.json: what a kernel needs of the compiler that makes it need most, in bf16 and,
of hybrid attention, in fp32 and fp16, whose tiles are fp32. Without the variable a part is
compiled.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import emulated, nvcc, nvrtc, operators
from helpers.cases import Case, make_inputs
from helpers.compare import assert_close, assert_same_state
from helpers.emulated_attention import Kernels
from helpers.states import arguments, empty_state, prepare, reference_of

needs_nvrtc = pytest.mark.skipif(
    nvrtc.library() is None, reason="nvidia-cuda-nvrtc is not installed"
)
BUDGET = Path(__file__).parent / "budgets" / "cuda.json"
STEP = "lol::cuda::hybrid_attention_step<lol::bf16, 16, 16, 1, true>"
STEPS = "lol::cuda::hybrid_attention_step<lol::bf16, 16, 8, 4, true>"  # of several queries
UPDATE = os.environ.get("UPDATE_CUDA_BUDGET")
HYBRIDS = {  # by D
    64: "lol::cuda::hybrid_attention<lol::bf16, 64, 64, 2, 64, 64, 1>",
    96: "lol::cuda::hybrid_attention<lol::bf16, 96, 64, 2, 96, 64, 2>",
    128: "lol::cuda::hybrid_attention<lol::bf16, 128, 64, 2, 128, 64, 2>",
}
HYBRID = HYBRIDS[64]
LARGE = "lol::cuda::hybrid_attention<lol::bf16, 128, 128, 2, 32, 64, 1>"
FEATURE_MAP = "lol::cuda::feature_map<lol::bf16, true>"
IN_CI = (STEP, STEPS, FEATURE_MAP, HYBRID)  # and LARGE, once
OPERATORS = (
    r"lol::cuda::(feature_map<lol::bf16|hybrid_attention_step<lol::bf16"
    r"|hybrid_attention<(lol::bf16|lol::f16|float)|linear_attention<lol::bf16),"
)
# PTX instructions that a warp executes, with a margin of 3 % for other versions of NVRTC.
INSTRUCTIONS_OF_A_CHUNK = {64: 6000, 96: 7170, 128: 4460}  # by D; of 8 warps with D = 128
INSTRUCTIONS_OF_A_STEP = 3570
TARGETS = ("sm_80", "sm_90", "sm_100")
BUDGETED = [
    (kernel, target)
    for kernel in filter(re.compile(OPERATORS).match, nvrtc.instances())
    for target in TARGETS
    if UPDATE or kernel in IN_CI or (kernel, target) == (LARGE, "sm_80")
]


def compilers(target):
    """Those that are installed. nvcc is asked for every target, NVRTC for one: half a minute."""
    if nvcc.NVCC:
        yield nvcc
    if nvrtc.library() and (target == "sm_90" or UPDATE):
        yield nvrtc


def test_instances_are_read_from_the_headers():
    assert {STEP, HYBRID, HYBRID.replace("hybrid", "linear")} < set(nvrtc.instances())


@pytest.mark.parametrize(("kernel", "target"), BUDGETED)
def test_kernels_stay_within_their_budget(kernel, target):
    entries = json.loads(BUDGET.read_text())
    name, needs = f"{kernel} {target}", [c.resources(kernel, target) for c in compilers(target)]
    if not needs:
        pytest.skip("no compiler for this target")
    most = {what: max(need[what] for need in needs) for what in needs[0]}
    assert most["spill_bytes"] == 0
    if UPDATE:
        BUDGET.write_text(json.dumps({**entries, name: most}, indent=1, sort_keys=True) + "\n")
    for what, allowed in json.loads(BUDGET.read_text())[name].items():
        assert most[what] <= allowed, f"{name}: {what} {most[what]}, at most {allowed}"


@pytest.mark.parametrize(("kernel", "blocks", "threads"), [(STEP, 4, 128), (STEPS, 2, 256)])
def test_blocks_of_the_step_share_the_registers_of_a_multiprocessor(kernel, blocks, threads):
    entries = json.loads(BUDGET.read_text())
    for target in TARGETS:
        assert blocks * threads * entries[f"{kernel} {target}"]["registers"] <= 64 * 1024


@needs_nvrtc
def test_the_compiled_step_is_right_and_moves_no_byte_twice():
    """bf16, D = f = 64, a sliding window of 64: one step of a state whose ring is full."""
    case = Case(D=64, G=1, window=64, batch=(1, 2))
    x = prepare(case, 71, torch.bfloat16)
    want, final = reference_of(x)
    state = empty_state(x)
    emulated.hybrid_attention_step_(*arguments(x, 0, 70), state)
    q, k, v, feature_q, feature_k, gate = arguments(x, 70, 71)
    q, k, v = (t.contiguous() for t in (q, k, v))
    out = torch.full_like(q, float("nan"))
    tensors = emulated.step_tensors(q, k, v, out, feature_q, feature_k, gate, state)
    settings = emulated.step_settings(q, feature_q, state)
    of_step = (*emulated.INPUTS, "kv", "ksum", "k_ring", "v_ring", "length", "folded")
    arguments_of_step = {**emulated.described(tensors), **settings}
    launch = emulated.planned("step", of_step, arguments_of_step)
    assert launch.kernel == STEP
    report = launch.run(nvrtc.ptx(STEP, "sm_80"), tensors)
    report.assert_clean()
    assert_close("out", out, want[:, :, 70:], torch.bfloat16)
    assert_same_state(state, final, torch.float32)

    moved = launch.traffic(report)
    least = sum(t.nbytes for t in (q, k, v, out)) + sum(
        t.nbytes for t in (state.kv, state.ksum, state.kv, state.ksum, state.k_ring, state.v_ring)
    )
    weights = ("weight_q", "weight_k")  # for all sequences of a batch: from the L2
    sectors = sum(t.sectors for name, t in moved.items() if name not in weights)
    assert sectors <= 1.05 * least
    assert sum(moved[name].sectors for name in weights) == 2 * feature_q.weight.nbytes
    assert report.instructions.total() / launch.warps <= INSTRUCTIONS_OF_A_STEP
    for access in report.accesses:
        assert access.sectors <= 1.01 * access.ideal_sectors, access
    narrow = [a for a in report.accesses if not re.search(r"\.v4|cp\.async\.cg", a.instruction)]
    assert sum(a.sectors for a in narrow) * 32 <= 0.05 * least  # ksum, counters, the gate


@needs_nvrtc
@pytest.mark.parametrize(("D", "reads_of_keys"), [(64, 2), (96, 1), (128, 1)])
def test_the_compiled_attention_is_right_and_reads_what_it_should(D, reads_of_keys):
    """bf16, f = 64, V = D, a sliding window of 64, two heads of four chunks."""
    case = Case(D=D, f=64, window=64, batch=(1, 2), dtype=torch.bfloat16)
    traffic, instructions = {}, []

    def run(**arguments):
        of_attention = (*emulated.INPUTS, "m", "den")
        launch = emulated.planned("hybrid_attention", of_attention, arguments)
        assert launch.kernel == HYBRIDS[D]
        report = launch.run(nvrtc.ptx(launch.kernel, "sm_80"), arguments)
        report.assert_clean()
        instructions.append(report.instructions.total() / launch.warps / 4)
        for name, moved in launch.traffic(report).items():
            traffic[name] = (moved, arguments[name].nbytes)

    want = operators.expected(operators.hybrid_attention, case).outputs["out"]
    got = operators.hybrid_attention(
        Kernels(run), make_inputs(case).as_dtype(torch.bfloat16, "plain")
    )["out"]
    assert_close("out", got, want.detach(), torch.bfloat16)
    for name in ("q", "o", "weight_q", "weight_k", "m", "den"):
        moved, size = traffic[name]
        assert moved.loaded + moved.stored == size, (name, moved, size)
    for name in ("k", "v"):  # the second time from the L2
        moved, size = traffic[name]
        assert moved.loaded <= reads_of_keys * size
    assert instructions[0] <= INSTRUCTIONS_OF_A_CHUNK[D]
