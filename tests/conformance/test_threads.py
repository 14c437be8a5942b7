"""The same bits, however many threads share the work."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.cases import Case, make_inputs
from helpers.kernels import CPU

import lolcats_ops as lo


def same_with_threads(call: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What ``call`` returns with one thread, once it has returned the same with two and four."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = call()
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, call(), want)), f"{threads} threads"
        return want
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "kind", "sink"), [(64, "sliding", 1), (50, "terrace", 0), (0, "sliding", 3)]
)
# Fewer heads than threads, and one more than two threads, or than four; as many sequences; states
# of few rows, and of several groups that go from thread to thread and are folded at a time; a state
# for every query head.
@pytest.mark.parametrize(
    ("batch", "f", "shared"),
    [
        ((1, 1), 12, "k"),
        ((1, 3), 12, "k"),
        ((1, 5), 12, "k"),
        ((3, 1), 12, "k"),
        ((1, 1), 40, "k"),
        ((1, 1), 12, "neither"),
    ],
)
def test_results_do_not_depend_on_threads(backend, dtype, window, kind, sink, batch, f, shared):
    case = Case("2048", D=20, f=f, G=2, batch=batch, window=window, shared=shared)
    x = make_inputs(case).as_dtype(dtype, "plain")
    q, k, v, gate = (x.leaves[n].detach() for n in ("q", "k", "v", "gate"))
    maps = [lo.Features(x.leaves[n].detach()) for n in ("weight_q", "weight_k")]
    windows = {"window": window, "window_kind": kind, "sink": sink, "backend": backend}

    def call() -> list[torch.Tensor]:
        out = lo.hybrid_attention(q, k, v, *maps, gate, **windows)
        stateful, state = lo.hybrid_attention(q, k, v, *maps, gate, **windows, return_state=True)
        options = {"feature_q": maps[0], "feature_k": maps[1], "return_state": True}
        linear, sums = lo.linear_attention(q, k, v, **options, backend=backend)
        leaves = [t.clone().requires_grad_() for t in (q, k, v, gate, *(m.weight for m in maps))]
        trained = [lo.Features(weight) for weight in leaves[4:]]
        y = lo.hybrid_attention(*leaves[:3], *trained, leaves[3], **windows)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [out, stateful, state.kv, state.ksum, linear, sums.kv, sums.ksum, *gradients]

    same_with_threads(call)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
# Two threads share the last one, or four.
@pytest.mark.parametrize(("kv_heads", "shared"), [(1, "k"), (3, "k"), (1, "neither")])
def test_distances_to_a_teacher_do_not_depend_on_threads(backend, dtype, packed, kv_heads, shared):
    case = Case("2048", D=20, f=12, G=2, batch=(1, kv_heads), window=40, shared=shared)
    x = make_inputs(case).as_dtype(dtype, "plain")
    leaves = [x.leaves[n].detach() for n in ("q", "k", "v", "weight_q", "weight_k", "gate")]
    layout = {"cu_seqlens": torch.tensor([0, 0, 1980, 2048], dtype=torch.int32)} if packed else {}

    def call() -> list[torch.Tensor]:
        trained = [t.clone().requires_grad_() for t in leaves[3:]]
        maps = map(lo.Features, trained[:2])
        result = lo.attention_transfer(
            *leaves[:3], *maps, trained[2], window=40, sink=2, xent=True, backend=backend, **layout
        )
        parts = [torch.autograd.grad(part, trained, retain_graph=True) for part in result[1:]]
        return [*result, *parts[0], *parts[1]]

    same_with_threads(call)


def one_head(length: int, dtype: torch.dtype, batch: int = 1) -> tuple:
    rng = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, batch, 1, length, 16, generator=rng).to(dtype)
    weight = torch.randn(1, 16, 12, generator=rng)
    return q, k, v, lo.Features(weight), lo.Features(weight.flip(2)), torch.zeros(1)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_a_team_takes_sequences_without_tokens_and_ends_within_a_block(backend, dtype, packed):
    length = 3 * 2048 + 45
    if packed:
        *qkv, feature_q, feature_k, gate = one_head(length, dtype)
        layout = {"cu_seqlens": torch.tensor([0, 0, 2900, length], dtype=torch.int32)}
    else:
        *qkv, feature_q, feature_k, gate = one_head(2090, dtype, batch=3)
        real = torch.tensor([[0], [2090], [2077]])
        layout = {"key_padding_mask": torch.arange(2090) < real}
    options = {**layout, "return_state": True, "backend": backend}

    def call() -> list[torch.Tensor]:
        out, state = lo.hybrid_attention(*qkv, feature_q, feature_k, gate, window=40, **options)
        linear, sums = lo.linear_attention(
            *qkv, feature_q=feature_q, feature_k=feature_k, **options
        )
        return [out, state.kv, state.ksum, linear, sums.kv, sums.ksum]

    results = same_with_threads(call)
    assert all(x.isfinite().all() for x in results)
    _, kv, ksum, _, linear_kv, linear_ksum = results
    assert not any(x[0].any() for x in (kv, ksum, linear_kv, linear_ksum))


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_states_do_not_depend_on_threads(backend, dtype):
    rng = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 1, 1, 2100, 16, generator=rng).to(dtype)
    weight, kv, dkv = (
        torch.randn(1, *s, generator=rng) for s in ((16, 12), (1, 24, 16), (1, 24, 16))
    )
    ksum, dksum = (torch.rand(1, 1, 24, generator=rng) + 1 for _ in "01")

    def call():
        leaves = [x.clone().requires_grad_() for x in (q, k, v, weight, kv, ksum)]
        phi = lo.Features(leaves[3])
        state = lo.HybridState.of_sums(
            *leaves[4:], torch.ones(1, dtype=torch.int64), head_dim=16, kv_heads=1
        )
        y, after = lo.linear_attention(
            *leaves[:3],
            feature_q=phi,
            feature_k=phi,
            state=state,
            return_state=True,
            backend=backend,
        )
        return [*torch.autograd.grad((y, after.kv, after.ksum), leaves, (dy, dkv, dksum))]

    same_with_threads(call)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "slack"), [("sliding", 0), ("sliding", 70), ("terrace", 20)])
def test_a_team_goes_on_from_a_state(backend, dtype, kind, slack):
    q, k, v, feature_q, feature_k, gate = one_head(5000, dtype)

    def call() -> list[torch.Tensor]:
        state = lo.HybridState.empty(
            1, 1, 1, 16, 16, 24, window=40, window_kind=kind, sink=3, slack=slack, dtype=dtype
        )
        parts = [
            lo.hybrid_attention_step_(
                *(x[:, :, at] for x in (q, k, v)),
                feature_q,
                feature_k,
                gate,
                state,
                backend=backend,
            )
            for at in (slice(2100), slice(2100, 2111), slice(2111, None))
        ]
        return [*parts, state.kv, state.ksum, state.k_ring, state.v_ring]

    assert all(x.isfinite().all() for x in same_with_threads(call))


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_threads_flush_denormals_if_the_caller_does(backend):
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2048, 16, generator=rng)
    weight = torch.randn(5, 16, 12, generator=rng)
    maps = lo.Features(weight), lo.Features(weight.flip(2))
    v *= 1e-38

    def call() -> list[torch.Tensor]:
        return [lo.hybrid_attention(q, k, v, *maps, torch.zeros(5), backend=backend)]

    (denormal,) = same_with_threads(call)  # by threads that were there before
    try:
        assert torch.set_flush_denormal(True)
        (flushed,) = same_with_threads(call)
    finally:
        torch.set_flush_denormal(False)
    assert not torch.equal(denormal, flushed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_without_the_threads_that_it_lost():
    script = """
import os, signal, numpy as np
from lolcats_ops import numpy as lnp
phi, x = lnp.Features(np.eye(64, dtype="f4")[None]), np.ones((4, 4, 512, 64), "f4")
before = lnp.feature_map(x, phi)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    signal.alarm(60)
    os._exit(not np.array_equal(lnp.feature_map(x, phi), before))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


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
