"""lo.backend_for: which backend runs a case, and why the others do not."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")
import torch

import lolcats_ops as lo
from lolcats_ops import dispatch
from lolcats_ops.ops import default, triton


def test_backend_for_answers_which_and_why():
    assert lo.backends() == ("cpu", "cuda", "triton", "reference")
    assert lo.backend_for("hybrid_attention").backend == "cpu"
    assert lo.backend_for("feature_map", backend="reference", device="cuda").backend == "reference"
    choice = lo.backend_for("hybrid_attention", device="cpu", head_dim=512)
    assert choice.backend is None
    assert "head dims up to 256" in choice.why
    with pytest.raises(ValueError, match="op is 'softmax', needs one of feature_map"):
        lo.backend_for("softmax")
    with pytest.raises(TypeError, match="dtype is 'float32', needs one of torch"):
        lo.backend_for("feature_map", dtype="float32")
    with pytest.raises(TypeError, match="no argument 'dim', needs device, dtype, head_dim"):
        lo.backend_for("feature_map", dim=64)
    with pytest.raises(ValueError, match="activation is 'tanh', needs one of softmax"):
        lo.backend_for("feature_map", activation="tanh")
    for device in ("tpu9", None):
        with pytest.raises(ValueError, match=f"device is {device!r}: "):
            lo.backend_for("feature_map", device=device)
    with pytest.raises(ValueError, match=r"backend is \[\], needs one of cpu"):
        lo.backend_for("feature_map", backend=[])
    for name, value in (("head_dim", 64.5), ("tokens", "1"), ("window", True), ("two_sided", 1)):
        with pytest.raises(TypeError, match=f"{name} is {value!r}, needs a"):
            lo.backend_for("feature_map", **{name: value})
    for name, bound in (("head_dim", 1), ("feature_dim", 0), ("sink", 0)):
        with pytest.raises(ValueError, match=f"{name} is {bound - 1}, needs >= {bound}"):
            lo.backend_for("feature_map", **{name: bound - 1})


@pytest.mark.parametrize("size", ["tokens", "window", "sink"])
def test_backend_for_answers_for_any_size(size):
    for value in (1 << 40, 2**63 - 1):
        settings = {"device": "cuda", "window_kind": "terrace", size: value}
        for op in lo.dispatch.OPS:
            assert lo.backend_for(op, backend="cuda", **settings).backend is None
    with pytest.raises(ValueError, match=f"{size} is {2**63}, needs an int64"):
        lo.backend_for("feature_map", **{size: 2**63})


@pytest.mark.parametrize("name", ["activation", "window_kind"])
@pytest.mark.parametrize("code", [-1, 6])
def test_unknown_codes_are_refused_before_a_kernel_is_chosen(name, code):
    x = torch.zeros(1, 1, 1, 1)
    arguments = {"q": x, "activation": 0, "two_sided": True, "window_kind": 0, name: code}
    with pytest.raises(ValueError, match=f"hybrid_attention: {name} is {code}, needs 0 to"):
        default._case("hybrid_attention", arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_dtype_that_nobody_computes_in_is_not_left_to_the_reference(dtype):
    choice = lo.backend_for("feature_map", dtype=dtype)
    assert choice.backend is None
    assert "reference" not in choice.why


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def why(**case):
        return lo.backend_for("hybrid_attention", backend="triton", **case)

    assert "it runs on cuda, not on cpu; with TRITON_INTERPRET=1" in why().why
    if not torch.cuda.is_available():
        assert why(device="cuda") == (None, "triton: this machine has no GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "false")  # Triton takes it as 0
    assert why().backend is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why().backend == "triton"
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    stock = interpreter.InterpreterBuilder()  # which tests/gpu_on_cpu may have replaced
    monkeypatch.setattr(interpreter, "interpreter_builder", stock)
    assert "the bits of bfloat16 as if they were integers" in why(dtype=torch.bfloat16).why
    assert why(dtype=torch.float16).backend == "triton"
    assert "head dims up to 256, not 320" in why(head_dim=320).why
    monkeypatch.setattr(dispatch, "_triton_version", lambda: (3, 6))
    assert why().why == "triton: its kernels need triton 3.7 or later, this is 3.6"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert why().why == "triton: triton is not installed (pip install triton)"


def test_an_old_triton_is_named_where_nobody_asked_for_it(monkeypatch):
    """As by the gradients of CUDA C++, which are Triton's."""
    monkeypatch.setattr(dispatch, "find_spec", lambda name: True)
    monkeypatch.setattr(dispatch, "_triton_version", lambda: (3, 6))
    triton._kernels.cache_clear()
    x, weight = torch.zeros(1, 1, 2, 16), torch.zeros(1, 16, 16)
    with pytest.raises(RuntimeError, match=r"of all gradients on a GPU: .* this is 3\.6"):
        torch.ops.lolcats_ops_triton.feature_map(x, weight, None, 0, True, False, 1e-12)


def test_without_kernels_for_a_device_every_backend_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    why = lo.backend_for("hybrid_attention", device="cuda", dtype=torch.bfloat16).why
    assert why == (
        f"triton: this machine has no GPU; cuda: {dispatch.NO_CUDA_KERNELS}; "
        "backend='reference' runs it"
    )


def test_an_unknown_instruction_set_is_named_with_those_there_are():
    script = "import lolcats_ops as lo; print(lo.backend_for('hybrid_attention').why)"
    environment = {**os.environ, "LOLCATS_ISA": "abacus"}
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, text=True, capture_output=True
    )
    assert "LOLCATS_ISA is 'abacus', needs one of" in said.stdout
