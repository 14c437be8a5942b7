"""The same bits, however many threads share the work."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.cases import Case, make_inputs
from helpers.kernels import CPU

import lolcats_ops as lo


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "kind", "sink"), [(64, "sliding", 1), (50, "terrace", 0), (0, "sliding", 3)]
)
@pytest.mark.parametrize("kv_heads", [1, 3])  # fewer than threads; and one more than two threads
def test_results_do_not_depend_on_threads(backend, dtype, window, kind, sink, kv_heads):
    case = Case("2048", D=20, f=12, G=2, batch=(1, kv_heads), window=window, shared="k")
    x = make_inputs(case).as_dtype(dtype, "plain")
    q, k, v, gate = (x.leaves[n].detach() for n in ("q", "k", "v", "gate"))
    maps = [lo.Features(x.leaves[n].detach()) for n in ("weight_q", "weight_k")]
    windows = {"window": window, "window_kind": kind, "sink": sink, "backend": backend}

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        out = lo.hybrid_attention(q, k, v, *maps, gate, **windows)
        stateful, state = lo.hybrid_attention(q, k, v, *maps, gate, **windows, return_state=True)
        options = {"feature_q": maps[0], "feature_k": maps[1], "return_state": True}
        linear, sums = lo.linear_attention(q, k, v, **options, backend=backend)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, gate, *(m.weight for m in maps))]
        trained = [lo.Features(weight) for weight in leaves[4:]]
        y = lo.hybrid_attention(*leaves[:3], *trained, leaves[3], **windows)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [out, stateful, state.kv, state.ksum, linear, sums.kv, sums.ksum, *gradients]

    before = torch.get_num_threads()
    try:
        want = run(1)
        for threads in (2, 4):
            assert all(map(torch.equal, run(threads), want)), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


def test_a_call_that_gets_fewer_threads_than_it_asks_for_is_right():
    # As within a parallel region of the caller's.
    script = """
import torch, lolcats_ops as lo
q, k, v = torch.randn(3, 1, 1, 2048, 16)
maps = lo.Features(torch.randn(1, 16, 16)), lo.Features(torch.randn(1, 16, 16))
results = []
for threads in (2, 1):
    torch.set_num_threads(threads)
    results.append(lo.hybrid_attention(q, k, v, *maps, torch.zeros(1), backend="cpu"))
assert torch.equal(*results)
"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
