"""HybridState as an object: sizes, devices, dtypes, rewinding, saving, transforms."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import lolcats_ops as lo


def small_step(state, dtype=torch.float32, tokens=3):
    """Tokens for a state of 2 sequences, 1 head, D = V = f = 4."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, tokens, 4, generator=rng).to(dtype)
    phi = lo.Features(torch.eye(4)[None])
    return lo.hybrid_attention_step_(q, k, v, phi, phi, torch.zeros(1), state)


@pytest.mark.parametrize("kind", ["sliding", "terrace"])
def test_rewind_without_a_window_and_by_a_scalar(kind):
    state = lo.HybridState.empty(2, 1, 1, 4, 4, 8, window=0, window_kind=kind, slack=2)
    small_step(state)
    assert state.rewind(torch.tensor(2)).length.tolist() == [1, 1]


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_forward_mode_through_a_state_is_refused_but_by_the_reference(backend):
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    phi, gate = lo.Features(torch.randn(2, 8, 8)), torch.zeros(2)

    def derivative(backend):
        def step(q):
            state = lo.HybridState.empty_for(k, v, phi, window=2)
            return lo.hybrid_attention_step_(q, k, v, phi, phi, gate, state, backend=backend)

        return torch.func.jvp(step, (q,), (q,))[1]

    with pytest.raises(NotImplementedError, match="an input has a tangent"):
        derivative(backend)
    assert derivative("reference").norm() > 0


def test_a_reset_of_slots_that_do_not_exist_changes_nothing():
    state = lo.HybridState.empty(3, 2, 2, 8, 8, 16, window=2)
    state.kv.fill_(1)
    with pytest.raises(IndexError):
        state.reset(torch.tensor([0, 7]))
    assert state.kv.eq(1).all()


def test_a_state_without_keys_goes_on_in_any_dtype():
    state = lo.HybridState.empty(2, 1, 1, 4, 4, 8, window=0, dtype=torch.bfloat16)
    other = lo.HybridState.empty(2, 1, 1, 4, 4, 8, window=0)
    assert small_step(state).equal(small_step(other))
    assert state.kv.equal(other.kv)


def test_sizes_of_few_bits_do_not_overflow():
    windows = {"window": np.int8(100), "window_kind": "terrace", "slack": np.int8(100)}
    assert lo.HybridState.empty(2, 1, 1, 4, 4, 8, **windows).ring == 300


def test_states_are_on_the_device_of_keys():
    k = torch.empty(2, 1, 3, 4, device="meta")
    state = lo.HybridState.empty_for(k, k, lo.Features(torch.eye(4)[None]), window=4)
    assert {x.device.type for x in state.tensors.values()} == {"meta"}


def test_states_of_fp64_go_on():
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 5, 4, generator=rng, dtype=torch.float64)
    phi, options = lo.Features(torch.eye(4)[None]), {"window": 2, "backend": "reference"}
    call = partial(lo.hybrid_attention, q, k, v, phi, phi, torch.zeros(1), **options)
    _, state = call(return_state=True)
    assert call(state=state).dtype == torch.float64


@pytest.mark.parametrize("mapped", [True, False])
def test_vmap_of_linear_attention_takes_initial_states(mapped):
    """Of every sample, whatever their layout together, or one for all."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.rand(3, 3, 1, 2, 5, 4, generator=rng)  # [3 samples, B = 1, H, T, D] each
    kv = torch.rand(3, 1, 3, 4, 4, generator=rng)[:, :, :2] if mapped else torch.rand(1, 2, 4, 4)
    length = torch.ones(1, dtype=torch.int64)

    def attend(q, k, v, kv):
        state = lo.HybridState.of_sums(kv, kv[..., 0], length, head_dim=4, kv_heads=2)
        return lo.linear_attention(q, k, v, state=state)

    got = torch.vmap(attend, (0, 0, 0, 0 if mapped else None))(q, k, v, kv)
    for i in range(3):
        torch.testing.assert_close(got[i], attend(q[i], k[i], v[i], kv[i] if mapped else kv))


@pytest.mark.parametrize("change", [{"window": 2.5}, {"slack": True}, {"heads": "2"}])
def test_sizes_of_states_are_integers(change):
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 4, "value_dim": 4}
    (name,) = change
    with pytest.raises(TypeError, match=rf"HybridState\.empty: {name} is .*, needs an integer"):
        lo.HybridState.empty(**{**sizes, "feature_dim": 8, "window": 4, **change})


def test_what_inference_mode_has_made_can_be_reset_and_rewound_outside():
    with torch.inference_mode():
        state = lo.HybridState.empty(2, 1, 1, 4, 4, 8, window=4, slack=2)
    assert state.reset().rewind(0).length.tolist() == [0, 0]


def test_rewind_takes_integers_alone():
    state = lo.HybridState.empty(1, 1, 1, 4, 4, 8, window=4, slack=2)
    for n in (1.5, "1", None, True, torch.tensor([1.5]), torch.tensor([True])):
        with pytest.raises(TypeError, match=r"HybridState\.rewind: n is"):
            state.rewind(n)
    with pytest.raises(ValueError, match=r"n has shape \[3\], needs \[1\]"):
        state.rewind(torch.zeros(3, dtype=torch.int64))


def test_slots_to_reset_have_any_integer_dtype():
    state = lo.HybridState.empty(1, 1, 1, 4, 4, 8, window=4)
    state.length.fill_(3)
    assert state.reset(torch.tensor([0], dtype=torch.int32)).length.item() == 0


def test_states_and_features_can_be_saved_and_compared(tmp_path):
    """torch.load loads what it knows to be safe; two feature maps are equal if they are one."""
    state = lo.HybridState.empty(1, 1, 1, 4, 4, 8, window=4)
    state.kv.normal_()
    phi = lo.Features(torch.eye(4)[None])
    torch.save((state, phi), tmp_path / "prompt.pt")
    loaded, features = torch.load(tmp_path / "prompt.pt")
    assert loaded.window == 4
    assert torch.equal(loaded.kv, state.kv)
    assert torch.equal(features.weight, phi.weight)
    assert features != phi
    assert phi in [features, phi]


@pytest.mark.parametrize(
    "options",
    [
        {"cu_seqlens": torch.tensor([0, 2, 6])},
        {"key_padding_mask": torch.tensor([[True, True, False, True, False, True]])},
    ],
    ids=str,
)
def test_vmap_of_packed_and_of_padded_rows(options):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 1, heads, 6, 16, generator=rng) for heads in (4, 2, 2))
    maps = [lo.Features(torch.eye(16)[None].repeat(n, 1, 1)) for n in (4, 2)]

    def attend(q, k, v):
        return lo.hybrid_attention(q, k, v, *maps, torch.zeros(4), window=2, **options)

    want = torch.stack([attend(q[i], k[i], v[i]) for i in range(3)])
    torch.testing.assert_close(torch.vmap(attend)(q, k, v), want)


@pytest.mark.parametrize("mapped", ["q", "weight"])
def test_vmap_of_no_samples_has_no_results(mapped):
    q, weight = torch.randn(1, 2, 6, 16), torch.randn(2, 16, 8)

    def features(x):
        return lo.feature_map(*((x, lo.Features(weight)) if mapped == "q" else (q, lo.Features(x))))

    none = torch.zeros(0, *{"q": q, "weight": weight}[mapped].shape)
    assert torch.vmap(features)(none).shape == (0, 1, 2, 6, 16)


class FailsLater(TorchDispatchMode):
    """Raises after an operator of this library has run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "lolcats_ops" in str(func):
            raise RuntimeError("not finite")
        return out


def test_a_step_that_raises_after_it_ran_does_not_run_again():
    def empty():
        return lo.HybridState.empty(2, 1, 1, 4, 4, 8, window=2)

    state = empty()
    with pytest.raises(RuntimeError, match="not finite"), FailsLater():
        small_step(state)
    assert state.length.tolist() == [3, 3]
    state = replace(empty(), kv=torch._neg_view(empty().kv))
    with pytest.raises(RuntimeError):
        small_step(state)
    assert state.length.tolist() == [3, 3]
    with torch.device("cpu"), pytest.raises(ValueError, match="folded"):
        small_step(replace(empty(), folded=torch.tensor([9, 9])))


@pytest.mark.parametrize("merged", [False, True])
def test_results_of_a_length_that_depends_on_data_keep_the_memory_order(merged):
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        length = environment.create_unbacked_symint()
        x = torch.empty(1, length, 2, 8).transpose(1, 2) if merged else torch.empty(1, 2, length, 8)
        y = lo.feature_map(x, lo.Features(torch.empty(2, 8, 8)))
        assert isinstance(y.stride(1), int) == merged  # of heads that lie together


def test_fake_states_without_maps_have_the_heads_of_keys():
    def sums(q, k, v):
        state = lo.linear_attention(q, k, v, return_state=True)[1]
        return state.kv.shape, state.ksum.shape

    shapes = (2, 8, 6, 16), (2, 4, 6, 16), (2, 4, 6, 12)
    want = sums(*map(torch.rand, shapes))
    with FakeTensorMode():
        assert sums(*map(torch.empty, shapes)) == want
