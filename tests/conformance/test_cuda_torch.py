"""backend="cuda" from torch, without a GPU: the torch shim on CUDA tensors that lie in the CPU's
memory, its launches run by the emulator (helpers/emulated_torch.py), and what the default is.
"""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")  # gradients

from gpu_on_cpu.cuda.tensors import FIRST_STREAM, cuda_tensors
from helpers.cases import Case, cases, make_inputs
from helpers.compare import assert_close, assert_same_state
from helpers.emulated_torch import launcher, on_cpu, on_cpu_tensors, on_cuda, only_notes
from helpers.kernels import INTERPRETED, skipped_where_refused
from helpers.operators import (
    attention_transfer,
    check,
    feature_map,
    hybrid_attention,
    linear_attention,
)
from helpers.states import arguments, empty_state, feed, prepare, reference_of

import lolcats_ops as lo
from lolcats_ops import _C, dispatch
from lolcats_ops.launches import launches_of
from lolcats_ops.ops import default, triton
from lolcats_ops.state import HybridState

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        bool(torch.version.cuda or torch.version.hip), reason="this torch has CUDA of its own"
    ),
    pytest.mark.skipif(not INTERPRETED, reason="gradients are those of the interpreted kernels"),
]
raw = torch.ops.lolcats_ops_cuda
SOFTMAX = (0, True, False, 1e-12)
A100 = SimpleNamespace(major=8, minor=0, shared_memory_per_block_optin=163 << 10)
A10 = SimpleNamespace(major=8, minor=6, shared_memory_per_block_optin=99 << 10)
T4 = SimpleNamespace(major=7, minor=5, shared_memory_per_block_optin=64 << 10)
H100 = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=227 << 10)


@pytest.fixture
def emulated(monkeypatch):
    """backend="cuda" takes CPU tensors."""
    limits = dispatch.Backend("cuda", None, dispatch._cuda_limits)
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", limits)
    with launcher() as last, on_cpu_tensors():
        yield last
    assert last.kernel  # something was launched


@pytest.fixture
def gpu(monkeypatch):
    """dispatch finds the GPU that it is given."""

    def pretend(properties) -> None:
        monkeypatch.setattr(dispatch, "_gpu", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    return pretend


# Results, and gradients by Triton

BF16 = {"dtype": torch.bfloat16, "D": 64, "f": 64, "window": 16, "batch": (1, 1)}
LINEAR = [
    Case("w+1", **BF16, G=2, shared="k", layout="strided", initial=True),
    Case("2w", **BF16, packing="packed", normalize=False),
]
HYBRID = [
    Case("w+1", **BF16, G=2, sink=1, layout="transposed", affine=True),
    Case("2w", **BF16, packing="packed", window_kind="terrace", bias=True),
]
MAPS = [
    Case("w+1", D=64, G=2, layout="strided", bias=True),
    Case("1", D=60, f=24, dtype=torch.bfloat16, activation="relu"),
]


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_feature_map_equals_the_reference(emulated, case):
    check(feature_map, case, "cuda")


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_attention_equals_the_reference(emulated, case):
    check(linear_attention, case, "cuda")


@pytest.mark.parametrize("case", HYBRID, ids=str)
def test_hybrid_attention_equals_the_reference(emulated, case):
    check(hybrid_attention, case, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_on_a_pool_equal_the_reference(emulated, dtype):
    x = prepare(Case(D=16, V=24, f=24, G=2, window=5, sink=1, batch=(2, 2)), 12, dtype)
    want, final = reference_of(x)
    pool, slots = empty_state(x, batch=4), torch.tensor([3, 1], dtype=torch.int32)
    out = feed(x, pool, [0, 7, 8, 9, 12], state_indices=slots, backend="cuda")
    assert_close("out", out, want, dtype)
    assert_same_state(pool.select(slots.long()), final, torch.float32)


def test_a_prompt_leaves_a_state_to_go_on_from(emulated):
    x = prepare(Case(D=16, V=24, f=24, window=5, batch=(1, 2)), 12, torch.float32)
    want, final = reference_of(x)
    options = {**x.case.windows, "return_state": True, "backend": "cuda"}
    first, state = lo.hybrid_attention(*arguments(x, 0, 8), **options)
    second, state = lo.hybrid_attention(*arguments(x, 8, 12), state=state, **options)
    assert_close("out", torch.cat([first, second], 2), want, torch.float32)
    assert_same_state(state, final, torch.float32)


def test_warmup_launches_them(emulated):
    sizes = {"heads": 1, "head_dim": 16, "tokens": (1,), "window": 5}
    assert lo.warmup("hybrid_attention_step_", backend="cuda", **sizes) == ()
    assert emulated.kernel.startswith(b"lol::cuda::hybrid_attention_step<float")


# Devices


def test_a_call_runs_on_the_device_of_its_tensors_and_its_current_stream():
    x, weight = torch.randn(1, 2, 5, 16), torch.randn(2, 16, 16)
    with launcher() as last:
        y = raw.feature_map(on_cuda(x, 1), on_cuda(weight, 1), None, *SOFTMAX)
    assert y.device == torch.device("cuda:1")
    assert (last.device, last.stream) == (1, FIRST_STREAM + 1)
    want = lo.reference.feature_map(x.double(), lo.Features(weight.double()))
    assert_close("y", on_cpu(y), want, torch.float32, floor=1e-3)


@pytest.mark.parametrize("index", [None, 1])
def test_tensors_of_several_devices_are_refused_by_name(index):
    x, weight = torch.randn(1, 2, 5, 16), torch.randn(2, 16, 16)
    other = weight if index is None else on_cuda(weight, index)
    where = "cpu" if index is None else f"cuda:{index}"
    with launcher(), pytest.raises(RuntimeError, match=f"weight is on {where}, needs x's cuda:0"):
        raw.feature_map(on_cuda(x), other, None, *SOFTMAX)


@pytest.mark.skipif(_C.has_cuda(), reason="this build has the kernels")
def test_without_kernels_or_launcher_a_call_says_so():
    x, weight = on_cuda(torch.randn(1, 2, 5, 16)), on_cuda(torch.randn(2, 16, 16))
    with cuda_tensors(), pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        raw.feature_map(x, weight, None, *SOFTMAX)


def test_gradients_have_no_cuda_kernels():
    x, weight = on_cuda(torch.randn(1, 2, 5, 16)), on_cuda(torch.randn(2, 16, 16))
    with launcher(), pytest.raises(RuntimeError, match="no CUDA kernel: use the Triton kernels"):
        raw.feature_map_backward(x, x, weight, None, *SOFTMAX)


# Choice


def calls(x) -> list:
    """Every operator with a CUDA kernel, on the inputs of a case."""
    features, windows = x.features("q"), x.case.windows
    maps = {} if features is None else {"feature_q": features, "feature_k": x.features("k")}
    options = {**x.sequences, "backend": "cuda"}
    found = [lambda: lo.linear_attention(*x.qkv, **maps, **options)]
    if features is None:
        return found
    hybrid = partial(
        lo.hybrid_attention, *x.qkv, **maps, gate=x.leaves["gate"], **windows, **options
    )
    found += [lambda: lo.feature_map(x.qkv[0], features, backend="cuda"), hybrid]
    if x.case.T:
        found.append(lambda: feed(x, empty_state(x), [0, x.case.T], backend="cuda"))
        found.append(partial(hybrid, return_state=True))  # refused with a mask
    return found


DECIDING = cases(
    *("D", "V", "f", "batch", "two_sided", "shared", "packing", "window_kind", "sink", "dtype"),
    activation=("softmax", "exp", "relu", None),
    length=("0", "1", "w+1"),
    window=(1, 16, 64),
    G=(1, 3),
)  # fmt: skip


@pytest.mark.parametrize("namespace", ["lolcats_ops_cuda", "lolcats_ops"])
def test_the_case_of_a_call_says_what_is_launched_or_why_nothing_is(monkeypatch, namespace):
    """The same of the public functions' cases and of those of torch.ops.lolcats_ops."""
    seen, refused = [], set()
    anything = dispatch.Backend("cuda", None, lambda case: seen.append(case))
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", anything)
    monkeypatch.setattr(default, "chosen", lambda case: seen.append(case) or "cuda")
    with launcher(only_notes()) as last, on_cpu_tensors(namespace), torch.no_grad():
        for case in DECIDING:
            for call in calls(make_inputs(case).as_dtype(case.dtype, "plain")):
                seen.clear()
                last.kernel, last.shared_bytes, error = None, 0, None
                try:
                    call()
                except (RuntimeError, ValueError) as raised:
                    error = str(raised).partition(": ")[2]
                launches = launches_of(seen[-1])
                assert launches.refusal == error, seen
                enough = launches.shared_bytes - last.shared_bytes
                assert enough >= 0 if "_step" in seen[-1].op else enough == 0, (seen, last.kernel)
                refused.add(error is not None)
    assert refused == {False, True}


CALL = {"device": "cuda", "dtype": torch.bfloat16, "tokens": 512}


@pytest.mark.parametrize(
    ("card", "op", "others", "best"),
    [
        (H100, "hybrid_attention_step_", {"tokens": 1}, "cuda"),
        (A10, "hybrid_attention_step_", {"tokens": 8}, "cuda"),
        (A100, "hybrid_attention_step_", {"tokens": 9}, "triton"),
        (A100, "hybrid_attention", {}, "triton"),
        (A100, "linear_attention", {"feature_dim": 0}, "triton"),
        (H100, "hybrid_attention", {}, "triton"),
        (A100, "feature_map", {}, "triton"),
        (A100, "attention_transfer", {}, "triton"),
        (T4, "hybrid_attention_step_", {"tokens": 1}, "triton"),
    ],
)
def test_the_default_is_the_backend_that_is_meant_to_be_faster(gpu, card, op, others, best):
    gpu(card)
    if not _C.has_cuda():
        assert lo.backend_for(op, **{**CALL, **others}).backend == "triton"
    with launcher(only_notes()):
        assert lo.backend_for(op, **{**CALL, **others}).backend == best


def test_a_card_with_too_little_shared_memory_gets_triton_and_is_told_why(gpu):
    gpu(A10)
    case = {**CALL, "dtype": torch.float32, "head_dim": 128}
    with launcher(only_notes()):
        assert lo.backend_for("hybrid_attention", **case).backend == "triton"
        choice = lo.backend_for("hybrid_attention", backend="cuda", **case)
    reason = r"cuda: a block needs \d{6} bytes of shared memory, on this GPU it has 101376"
    assert choice.backend is None
    assert re.fullmatch(reason, choice.why)


def test_backend_cuda_says_why_it_cannot_run(gpu, monkeypatch):
    def why(op="hybrid_attention_step_", **others):
        return lo.backend_for(op, backend="cuda", **{**CALL, **others}).why

    assert why(device="cpu") == "cuda: it runs on cuda, not on cpu"
    assert why("attention_transfer").endswith("no CUDA kernel: use the Triton kernels")
    assert "head dims up to 256, not 320" in why(head_dim=320)
    if not _C.has_cuda():
        assert "lolcats_ops.cupy.install_launcher() compiles them with CuPy" in why()
    with launcher(only_notes()):
        assert why() == "cuda: this machine has no GPU"
        gpu(T4)
        assert "need compute capability 8.0, this GPU has 7.5" in why()
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert why() == "cuda: its kernels are for NVIDIA's GPUs"


def test_conformance_skips_what_the_kernels_refuse_and_nothing_else(emulated):
    x = make_inputs(Case("1", D=16)).as_dtype(torch.float32, "plain")
    with (
        pytest.raises(pytest.skip.Exception, match="no CUDA kernel"),
        skipped_where_refused("cuda"),
    ):
        attention_transfer(lo, x, backend="cuda")
    with pytest.raises(ValueError, match="gate"), skipped_where_refused("cuda"):
        lo.hybrid_attention(*arguments(x)[:5], torch.zeros(5), backend="cuda")
    feature_map(lo, x, backend="cuda")


@pytest.mark.parametrize("asked", [None, "cuda"])
def test_steps_on_cuda_tensors_run_on_their_device(gpu, asked):
    gpu(H100)
    x = prepare(Case(D=16, V=24, f=24, G=2, window=5, sink=1, batch=(1, 2)), 9, torch.float32)
    want, final = reference_of(x)
    state = empty_state(x)
    there = HybridState(**on_cuda(state.tensors, 1), window=state.window)
    moved = replace(x, leaves=on_cuda(x.leaves, 1))
    parameters = (moved.features("q"), moved.features("k"), moved.leaves["gate"])
    with launcher() as last:
        outs = [
            lo.hybrid_attention_step_(
                *on_cuda(arguments(x, i, i + 1)[:3], 1), *parameters, there, backend=asked
            )
            for i in range(9)
        ]
    assert (last.device, last.stream) == (1, FIRST_STREAM + 1)
    assert_close("out", torch.cat(on_cpu(outs), 2), want, torch.float32)
    assert_same_state(state, final, torch.float32)  # in the memory of ``there``


@pytest.fixture
def current_devices(monkeypatch):
    """Those that were made current."""
    devices = []
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda i: devices.append(i) or -1)
    return devices


def test_triton_launches_on_the_device_of_the_tensors(current_devices, monkeypatch):
    kernels = SimpleNamespace(feature_map=lambda x: current_devices[-1])
    monkeypatch.setattr(triton, "_kernels", lambda: kernels)
    with cuda_tensors():
        assert triton.implementation("feature_map")(on_cuda(torch.ones(1), 1)) == 1


def test_torch_ops_on_cuda_tensors_run_the_default(gpu, current_devices, monkeypatch):
    def by_triton():
        raise RuntimeError("these are Triton's")

    monkeypatch.setattr(triton, "_kernels", by_triton)
    anywhere = dispatch.Backend("cuda", "cuda", dispatch._cuda_limits)
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", anywhere)
    gpu(A100)
    x = prepare(Case(D=16, V=24, f=24, G=2, window=5, batch=(1, 2)), 9, torch.float32)
    want, final = reference_of(x)
    state = empty_state(x)
    with launcher(), on_cpu_tensors("lolcats_ops"):
        assert_close("out", feed(x, state, [0, 8, 9], backend="cuda"), want, torch.float32)
        assert_same_state(state, final, torch.float32)
        with pytest.raises(RuntimeError, match="these are Triton's"):
            feed(x, empty_state(x), [0, 9], backend="cuda")
