"""lo.warmup: what it compiles is what the first calls would have compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch

import lolcats_ops as lo

# A machine that takes CPU tensors for a GPU's, and never launches.
MACHINE = """
import torch, triton
import lolcats_ops as lo
from gpu_on_cpu.compiler import driver_for
from lolcats_ops import dispatch
from lolcats_ops.kernels.triton import launch

triton.runtime.driver.set_active(driver_for("sm_90"))
dispatch._not_interpreted = lambda dtype: None
settings = {"backend": "triton", "dtype": torch.bfloat16, "head_dim": 16}

JIT = triton.runtime.jit.JITFunction
compile = JIT._do_compile  # what a call comes to that finds no compiled kernel
"""

# Every compilation is printed.
COMPILATIONS = """
def report(self, *args, **options):
    print("compiled", self.fn.__name__)
    return compile(self, *args, **options)

JIT._do_compile = report
print("warm", *lo.warmup("feature_map", **settings, tokens=(1, 32), backward=True))
x = torch.randn(1, 8, 32, 16, dtype=torch.bfloat16, requires_grad=True)
print("call")
with launch.compiling() as names:
    y = lo.feature_map(x, lo.Features(torch.randn(8, 16, 16)), backend="triton")
    y.backward(torch.ones_like(y))
print("called", *sorted(names))
with launch.compiling():
    lo.feature_map(x[:, :, :17], lo.Features(torch.randn(8, 16, 16)), backend="triton")
decode = {**settings, "window": 8, "tokens": (1,)}
print("warm", *lo.warmup("hybrid_attention_step_", **decode, affine=True, slack=3, sink=1))
def step():
    q, k, v = torch.randn(3, 1, 8, 1, 16, dtype=torch.bfloat16)
    phi = lo.Features(torch.randn(8, 16, 16))
    state = lo.HybridState.empty_for(k, v, phi, window=8, slack=3, sink=1)
    with torch.no_grad(), launch.compiling():
        lo.hybrid_attention_step_(
            q, k, v, phi, phi, torch.zeros(8), state, affine=True, backend="triton"
        )
step()
print("warm", *lo.warmup("feature_map", **settings, tokens=(32,), transposed=True))
with launch.compiling():
    x = torch.randn(1, 32, 8, 16, dtype=torch.bfloat16).transpose(1, 2)
    lo.feature_map(x, lo.Features(torch.randn(8, 16, 16)), backend="triton")
print("warm", *lo.warmup("hybrid_attention_step_", **{**decode, "tokens": (32,)}, padded=True))
"""

# Nothing is compiled, only asked for: which kernels of a call its operator's warmup has not named.
SETTINGS = """
asked = []
JIT._do_compile = lambda self, key, *args, **options: asked.append((self.fn.__name__, key))

def kernels_of(call):
    asked.clear()
    call()
    return set(asked)

shape = {"kv_heads": 2, "heads": 4, "value_dim": 24, "feature_dim": 8, "batch": 2, "tokens": (48,)}
q, k, v = (
    torch.randn(2, heads, 48, width, dtype=torch.bfloat16, requires_grad=True)
    for heads, width in ((4, 16), (2, 16), (2, 24))
)
phi = lo.Features(torch.randn(4, 16, 8, requires_grad=True))
gate = torch.zeros(4, requires_grad=True)
mask = torch.ones(2, 48, dtype=torch.bool)
window = {"window": 8, "sink": 1, "window_kind": "terrace"}

def linear():
    y = lo.linear_attention(
        q, k, v, feature_q=phi, feature_k=phi, key_padding_mask=mask, backend="triton"
    )
    y.sum().backward()

def hybrid():
    options = {"affine": True, "key_padding_mask": mask, "backend": "triton"}
    lo.hybrid_attention(q, k, v, phi, phi, gate, **window, **options).sum().backward()

def transfer():
    inputs = (x.detach() for x in (q, k, v))
    options = {"xent": True, "key_padding_mask": mask, "backend": "triton"}
    loss = lo.attention_transfer(*inputs, phi, phi, gate, **window, **options)
    (loss.mse + loss.xent).backward()

@torch.no_grad()
def step():
    state = lo.HybridState.empty_for(k, v, phi, **window, slack=3)
    options = {"affine": True, "key_padding_mask": mask, "backend": "triton"}
    lo.hybrid_attention(q, k, v, phi, phi, gate, **window, **options, state=state)

@launch.compiling()
def in_call(call):
    return kernels_of(call)

for op, call, own in (
    ("linear_attention", linear, {}),
    ("hybrid_attention", hybrid, {**window, "affine": True}),
    ("attention_transfer", transfer, {**window, "xent": True}),
    ("hybrid_attention_step_", step, {**window, "affine": True, "slack": 3}),
):
    options = {**settings, **shape, **own, "padded": True, "backward": True}
    warm = kernels_of(lambda: lo.warmup(op, **options))
    called = in_call(call)
    print(op, len(called), *sorted({name for name, _ in called - warm}))
"""


def run_on_machine(program: str) -> list[str]:
    """What a program prints there."""
    pytest.importorskip("triton")
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parent), "TRITON_INTERPRET": "0"
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", MACHINE + program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_calls_after_a_warmup_find_their_kernels_compiled():
    lines = run_on_machine(COMPILATIONS)
    kernels = "feature_map_forward feature_map_gradients"
    warm, call, called = (lines.index(x) for x in (f"warm {kernels}", "call", f"called {kernels}"))
    assert {line.split()[1] for line in lines[:warm]} == set(kernels.split())
    assert called == call + 1  # nothing was compiled
    assert lines[called + 1 :] == [
        "compiled feature_map_forward",  # 17 tokens were not warmed up
        "compiled attention_step",  # in the warmup of a decoding state, and not in its step
        "warm attention_step",
        "compiled feature_map_forward",  # in the warmup of the other layout
        "warm feature_map_forward",
        "compiled attention_step",  # with padding
        "warm attention_step",
    ]


def test_a_warmup_with_a_calls_settings_names_its_kernels():
    assert run_on_machine(SETTINGS) == [
        "linear_attention 3",
        "hybrid_attention 3",
        "attention_transfer 6",
        "hybrid_attention_step_ 1",
    ]


def test_the_cpus_kernels_are_only_loaded():
    settings = {"slack": 2, "affine": True, "padded": True}
    assert lo.warmup(*lo.dispatch.OPS, dtype=torch.bfloat16, tokens=(1, 64), **settings) == ()


def test_a_case_that_no_backend_runs_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="warmup: hybrid_attention: cpu: its kernels take float32"):
        lo.warmup("hybrid_attention", dtype=torch.float64)
    wide = lo.Features(torch.zeros(8, 64, 300))
    with pytest.raises(ValueError, match="warmup: feature_map: cpu: its kernels take maps up to"):
        lo.warmup("feature_map", feature_q=wide)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"linear_attention: .*this machine has no GPU"):
            lo.warmup("linear_attention", device="cuda")
    with pytest.raises(ValueError, match="tokens is empty, needs lengths"):
        lo.warmup("feature_map", tokens=())
    with pytest.raises(ValueError, match="op is 'attention', needs one of"):
        lo.warmup("attention")
