"""The recurrent state: every way of cutting a sequence gives the same outputs and state."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from helpers.cases import Case, Inputs, make_inputs
from helpers.compare import assert_close, assert_same_state
from helpers.kernels import CPU, GPU
from helpers.states import (
    arguments,
    case_of,
    empty_state,
    feed,
    on_all,
    on_kernels,
    prepare,
    reference_of,
    windows,
)

import lolcats_ops as lo

pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = pytest.mark.parametrize(
    "backend",
    GPU or [pytest.param("triton", marks=pytest.mark.skip("needs a GPU and TRITON_INTERPRET=0"))],
    indirect=True,
)


@on_all
@windows
def test_every_split_equals_one_call(backend, device, window, kind, sink, slack):
    length = 7 if backend == "cpu" else 4  # 2 ** (length - 1) splits
    x = prepare(case_of(window, kind, sink), length, torch.float32, device)
    want, final = reference_of(x, slack)
    for inner in itertools.product((False, True), repeat=length - 1):
        cuts = [0, *(i + 1 for i, cut in enumerate(inner) if cut), length]
        state = empty_state(x, slack)
        out = feed(x, state, cuts, backend=backend)
        assert_close(f"out of cuts {cuts}", out, want, torch.float32)
        assert_same_state(state, final, torch.float32)


@on_kernels
@windows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_splits_equal_one_call(backend, device, window, kind, sink, slack, dtype):
    length = 150
    x = prepare(case_of(window, kind, sink, affine=True), length, dtype, device)
    want, final = reference_of(x, slack)
    rng = random.Random(window)
    for pieces in (1, 4, 12):
        cuts = [0, *sorted(rng.sample(range(1, length), pieces - 1)), length]
        state = empty_state(x, slack)
        assert_close(f"cuts {cuts}", feed(x, state, cuts, backend=backend), want, dtype)
        # Products of bf16 round what they add to the sums.
        assert_same_state(state, final, dtype if dtype == torch.bfloat16 else torch.float32)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_of_widths_that_end_within_a_vector(backend, dtype):
    """Whole vectors and a rest of D, V and f on every instruction set, one token at a time."""
    length = 14
    case = replace(case_of(5, "sliding", 1), D=20, V=84, f=72)
    x = prepare(case, length, dtype)
    want, final = reference_of(x, slack=1)
    state = empty_state(x, slack=1)
    out = feed(x, state, list(range(length + 1)), backend=backend)
    assert_close("out", out, want, dtype)
    assert_same_state(state, final, dtype if dtype == torch.bfloat16 else torch.float32)


@on_kernels
def test_a_bf16_state_keeps_its_mass(backend, device):
    """The sums are fp32: what a bf16 sum would lose grows with T (SPEC 5)."""
    x = make_inputs(Case("2048", D=32, window=16)).as_dtype(torch.bfloat16, "plain", device)
    x = Inputs(x.case, {n: t.detach() for n, t in x.leaves.items()}, {})
    _, state = lo.hybrid_attention(
        *arguments(x, 0, 2048), window=16, return_state=True, backend=backend
    )
    # Two softmaxes: the features of every folded token sum to 2.
    mass = 2 * state.folded[:, None].double()
    assert_close(
        "mass",
        state.ksum.double().sum(-1),
        mass.expand(-1, state.ksum.shape[1]),
        torch.float32,
        factor=20,
    )


@on_all
@windows
def test_attention_with_a_state_continues_it_and_leaves_it_alone(
    backend, device, window, kind, sink, slack
):
    x = prepare(case_of(window, kind, sink), 11, torch.float32, device)
    want, _ = reference_of(x)
    options = {**x.case.windows, "return_state": True, "backend": backend}
    first, state = lo.hybrid_attention(*arguments(x, 0, 6), **options)
    before = state.clone()
    second, after = lo.hybrid_attention(*arguments(x, 6), state=state, **options)
    assert_close("out", torch.cat([first, second], 2), want, torch.float32)
    assert_same_state(state, before, torch.float32)
    assert after.length.tolist() == [11] * after.batch


@on_kernels
def test_4096_bf16_steps_stay_as_accurate_as_the_first(backend, device):
    x = make_inputs(Case(D=32, G=2, batch=(1, 1), window=64, sink=1)).as_dtype(
        torch.bfloat16, "plain", device
    )
    rng = torch.Generator().manual_seed(0)
    shapes = {"q": (1, 2, 4096, 32), "k": (1, 1, 4096, 32), "v": (1, 1, 4096, 32)}
    rows = {n: torch.randn(s, generator=rng).to(x.leaves[n]) for n, s in shapes.items()}
    x = Inputs(x.case, {n: t.detach() for n, t in {**x.leaves, **rows}.items()}, {})
    out = feed(x, empty_state(x), list(range(4097)), backend=backend)

    wide = Inputs(x.case, {n: t.double() for n, t in x.leaves.items()}, {})
    state = empty_state(wide)
    chunks = itertools.pairwise(range(0, 4097, 256))
    for a, b in chunks:
        want = lo.reference.hybrid_attention_step_(*arguments(wide, a, b), state)
        assert_close(f"steps {a} to {b}", out[:, :, a:b], want, torch.bfloat16)


@on_all
@windows
def test_rewind_and_replay_equals_no_rewind(backend, device, window, kind, sink, slack):
    x = prepare(case_of(window, kind, sink), 30, torch.float32, device)
    want, final = reference_of(x, slack)
    state = empty_state(x, slack)
    outs = []
    for i in range(30):
        outs.append(lo.hybrid_attention_step_(*arguments(x, i, i + 1), state, backend=backend))
        n = min(slack, i + 1)
        state.rewind(n)
        again = feed(x, state, [i + 1 - n, i + 1], backend=backend) if n else outs[-1][:, :, :0]
        expected = torch.cat(outs, 2)[:, :, i + 1 - n :]
        assert_close(f"tokens {i + 1 - n} to {i}", again, expected.double(), torch.float32)
    assert_close("out", torch.cat(outs, 2), want, torch.float32)
    assert_same_state(state, final, torch.float32)


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_many_sinks_go_on_without_a_ring(backend, device):
    q, k, v = torch.randn(3, 1, 1, 50, 8, generator=torch.Generator().manual_seed(0))
    rest = (*2 * [lo.Features(torch.eye(8)[None])], torch.zeros(1))
    options = {"window": 0, "sink": 40, "backend": backend}
    whole = lo.hybrid_attention(q, k, v, *rest, **options)
    first, state = lo.hybrid_attention(
        *(x[:, :, :45] for x in (q, k, v)), *rest, **options, return_state=True
    )
    then = lo.hybrid_attention(*(x[:, :, 45:] for x in (q, k, v)), *rest, **options, state=state)
    torch.testing.assert_close(torch.cat((first, then), 2), whole)


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_positions_may_be_large(backend, device):
    q, k, v = torch.randn(3, 1, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    rest = (*2 * [lo.Features(torch.eye(8)[None])], torch.zeros(1))
    _, near = lo.hybrid_attention(q, k, v, *rest, window=4, sink=1, return_state=True)
    far = near.clone()
    for state in (near, far):  # 4 tokens of the ring remain, at the same slots
        state.folded.copy_(state.length - 4)
    far.length.add_(2**32)
    far.folded.add_(2**32)
    results = [
        lo.hybrid_attention_step_(
            q[:, :, :n], k[:, :, :n], v[:, :, :n], *rest, state, backend=backend
        )
        for n in (1, 3)
        for state in (near, far)
    ]
    assert results[0].equal(results[1])
    assert results[2].equal(results[3])


def test_masks_bounds_and_indices_may_lie_anywhere():
    q, k, v = torch.randn(3, 2, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    rest = (*2 * [lo.Features(torch.eye(8)[None])], torch.zeros(1))
    real = torch.arange(9)[:, None].repeat(1, 2) < torch.tensor([9, 5])
    got, want = (
        lo.hybrid_attention(q, k, v, *rest, window=4, key_padding_mask=mask)
        for mask in (real.t(), real.t().contiguous())
    )
    assert got.equal(want)
    bounds = torch.tensor([0, 99, 4, 99, 9, 99])[::2]
    got, want = (
        lo.linear_attention(
            q[:1], k[:1], v[:1], feature_q=rest[0], feature_k=rest[1], cu_seqlens=at
        )
        for at in (bounds, bounds.contiguous())
    )
    assert got.equal(want)
    _, state = lo.hybrid_attention(q, k, v, *rest, window=4, return_state=True)
    slots = torch.tensor([1, 99, 0, 99])[::2]
    got, want = (
        lo.hybrid_attention_step_(q, k, v, *rest, state.clone(), state_indices=at)
        for at in (slots, slots.contiguous())
    )
    assert got.equal(want)


def test_rewind_refuses_what_has_been_folded():
    x = prepare(case_of(3, "sliding", 0), 30, torch.float32)
    state = empty_state(x, slack=2)
    feed(x, state, [0, 30])
    with pytest.raises(ValueError, match="n is 4, which reaches tokens already folded"):
        state.rewind(4)
    state.rewind(1).rewind(1)
    with pytest.raises(ValueError, match="already folded"):
        state.rewind(2)
    with pytest.raises(ValueError, match="needs 0 <= n <= length"):
        state.rewind(-1)
    assert state.length.tolist() == [28, 28]


@on_all
def test_steps_on_a_pool_touch_their_own_slots_alone(backend, device):
    x = prepare(case_of(3, "sliding", 1), 9, torch.float32, device)
    want, final = reference_of(x)
    slots = torch.tensor([4, 1], dtype=torch.int32, device=device)
    pool = empty_state(x, batch=6)
    before = pool.clone()
    out = feed(x, pool, [0, 5, 6, 7, 8, 9], state_indices=slots, backend=backend)
    assert_close("out", out, want, torch.float32)
    assert_same_state(pool.select(slots.long()), final, torch.float32)
    others = torch.tensor([0, 2, 3, 5], device=device)
    for name, was in before.select(others).tensors.items():
        now = pool.select(others).tensors[name]
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_replayed_as_a_cuda_graph_equals_an_eager_one(backend, device, dtype):
    length = 9
    x = prepare(case_of(3, "sliding", 1), length, dtype, device)
    eager = empty_state(x)
    want = feed(x, eager, list(range(length + 1)), backend=backend)

    static = [t[:, :, :1].clone() for t in x.qkv]
    inputs = (*static, *arguments(x)[3:])
    lo.hybrid_attention_step_(*inputs, empty_state(x), backend=backend)  # compiles
    state, graph = empty_state(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lo.hybrid_attention_step_(*inputs, state, backend=backend)
    outs = []
    for i in range(length):
        for held, t in zip(static, x.qkv, strict=True):
            held.copy_(t[:, :, i : i + 1])
        graph.replay()
        outs.append(out.clone())
    assert torch.equal(torch.cat(outs, 2), want)
    assert_same_state(state, eager, dtype)


@on_all
@windows
@pytest.mark.parametrize("packing", ["left", "right", "packed"])
def test_padded_and_packed_equal_unpadded_states_included(
    backend, device, window, kind, sink, slack, packing
):
    case = case_of(window, kind, sink)
    lengths = (13, 0, 1, 7)
    one = replace(case, batch=(1, 2))
    alone = [prepare(one, n, torch.float32, device, seed=n) for n in lengths]
    for a in alone[1:]:  # one set of parameters
        a.leaves.update({n: t for n, t in alone[0].leaves.items() if t.ndim < 4})
    bounds = [0, *itertools.accumulate(lengths)]
    if packing == "packed":
        rows = [torch.cat([a.leaves[n] for a in alone], 2) for n in ("q", "k", "v")]
        sequences = {"cu_seqlens": torch.tensor(bounds, device=device)}
    else:
        real = (torch.arange(13) < torch.tensor(lengths)[:, None]).to(device)
        mask = real if packing == "right" else real.flip(1)
        rows = [torch.cat([_pad(a.leaves[n], 13, packing) for a in alone]) for n in ("q", "k", "v")]
        sequences = {"key_padding_mask": mask}
    parameters = (*arguments(alone[0])[3:],)
    options = {**case.windows, **sequences, "backend": backend}
    out = lo.hybrid_attention(*rows, *parameters, **options)
    stateful, states = lo.hybrid_attention(*rows, *parameters, **options, return_state=True)
    assert_close("out with a state", stateful, out.double(), torch.float32)
    if packing != "packed":
        assert (out.transpose(1, 2)[~mask] == 0).all()
    for b, x in enumerate(alone):
        want, state = lo.reference.hybrid_attention(
            *arguments(x), **case.windows, return_state=True
        )
        got = (
            out[:, :, bounds[b] : bounds[b + 1]]
            if packing == "packed"
            else out.transpose(1, 2)[b][mask[b]].transpose(0, 1)[None]
        )
        assert_close(f"sequence {b}", got, want.double(), torch.float32)
        assert_same_state(states.select(torch.tensor([b], device=device)), state, torch.float32)


def _pad(x: torch.Tensor, length: int, side: str) -> torch.Tensor:
    """Padding that would spoil everything it touched."""
    room = x.new_full((1, x.shape[1], length - x.shape[2], x.shape[3]), 1e4)
    return torch.cat([x, room] if side == "right" else [room, x], 2)


@on_kernels
@pytest.mark.parametrize("bounds", [[0, 15], [0, 0, 16], [0, 1, 100, 300, 1200, 2048]])
def test_packed_sequences_equal_each_alone(backend, device, bounds):
    case = Case("2048", D=32, G=1, batch=(1, 1), window=64, sink=1)
    x = make_inputs(case).as_dtype(torch.float32, "plain", device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    x = Inputs(case, {n: t.detach() for n, t in x.leaves.items()}, {})
    packed = lo.hybrid_attention(
        *arguments(x, 0, bounds[-1]), **case.windows, cu_seqlens=cu_seqlens, backend=backend
    )
    for a, b in itertools.pairwise(bounds):
        alone = lo.hybrid_attention(*arguments(x, a, b), **case.windows, backend=backend)
        assert_close(f"tokens {a} to {b}", packed[:, :, a:b], alone.double(), torch.float32)


def test_state_select_clone_and_reset():
    x = prepare(case_of(3, "terrace", 1), 9, torch.float32)
    state = empty_state(x, slack=1)
    feed(x, state, [0, 9])
    chosen = state.select(torch.tensor([1, 1, 0]))
    assert chosen.batch == 3
    assert torch.equal(chosen.kv[0], state.kv[1])
    copy = state.clone()
    state.reset(torch.tensor([0]))
    assert state.length.tolist() == [0, 9]
    assert not state.kv[0].any()
    assert state.kv[1].any()
    assert copy.length.tolist() == [9, 9]
    # float32: kv, ksum; k and v of ring (2 * 3 + 1) and sink; two counters
    per_slot = 4 * (2 * 48 * 21 + 2 * 8 * (16 + 20)) + 16
    assert state.nbytes == 2 * per_slot
    want, _ = reference_of(x, 1)
    state.reset()
    assert_close("out after a reset", feed(x, state, [0, 9]), want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_hybrid_attention_continue_each_other_without_a_window(dtype):
    x = prepare(case_of(0, "sliding", 0), 20, dtype)
    q, k, v, phi_q, phi_k, gate = arguments(x)
    maps = {"feature_q": phi_q, "feature_k": phi_k}
    want, _ = lo.hybrid_attention(q, k, v, **maps, gate=gate, window=0, return_state=True)
    first, rest = ([t[:, :, part] for t in (q, k, v)] for part in (slice(8), slice(8, None)))
    _, state = lo.linear_attention(*first, **maps, return_state=True)
    got = lo.hybrid_attention(*rest, **maps, gate=gate, window=0, state=state)
    assert_close("out", got, want[:, :, 8:].double(), dtype)


def test_states_of_linear_attention_may_be_expanded():
    x = prepare(case_of(0, "sliding", 0, batch=(3, 1)), 20, torch.float32)
    q, k, v, phi_q, phi_k, _ = arguments(x)
    kv = torch.rand(1, phi_k.heads, phi_k.out_features, v.shape[3], requires_grad=True)
    sizes = {"head_dim": q.shape[3], "kv_heads": k.shape[1]}

    def gradient(backend):
        wide = kv.expand(3, -1, -1, -1)
        state = lo.HybridState.of_sums(wide, wide[..., 0], torch.zeros(3).long(), **sizes)
        maps = {"feature_q": phi_q, "feature_k": phi_k}
        y = lo.linear_attention(q, k, v, **maps, state=state, backend=backend)
        return torch.autograd.grad(y.square().sum(), kv)[0]

    torch.testing.assert_close(gradient(None), gradient("reference"), rtol=1e-4, atol=1e-4)
