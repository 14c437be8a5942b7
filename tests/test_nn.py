"""The modules of lolcats_ops.nn are their operators with their own settings."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import lolcats_ops as lo

H, KV, D, T = 4, 2, 16, 40


@pytest.fixture
def qkv():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, T, D, generator=rng) for heads in (H, KV, KV)]


def features(module):
    settings = {"activation": "elu1", "two_sided": False, "skip": True, "eps": 0.3}
    return lo.Features(module.weight, module.bias, **settings)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_hybrid_attention_is_its_operators(qkv, affine, share):
    windows = {"window": 8, "window_kind": "terrace", "sink": 1}
    maps = {"activation": "elu1", "bias": True, "skip": True, "eps": 0.3}
    attention = lo.nn.HybridAttention(
        H, KV, D, **windows, affine=affine, gate_init=0.3, share_kv_features=share, **maps
    )
    assert attention.gate.equal(torch.full((H,), 0.3))
    assert attention.feature_k.weight.shape[0] == (KV if share else H)
    parameters = features(attention.feature_q), features(attention.feature_k), attention.gate
    settings = {**windows, "affine": affine}
    with torch.no_grad():
        want = lo.hybrid_attention(*qkv, *parameters, **settings)
        assert attention(*qkv).equal(want)
        transfer = lo.attention_transfer(*qkv, *parameters, **settings)
        assert attention.transfer(*qkv).mse.equal(transfer.mse)
    state = attention.empty_state(2, slack=3)
    assert (state.slack, state.kv.shape[1]) == (3, attention.feature_k.weight.shape[0])
    out = torch.cat(
        [attention.step_(*(x[:, :, i : i + 1] for x in qkv), state) for i in range(T)], 2
    )
    torch.testing.assert_close(out, want)
    assert attention.empty_state(1, value_dim=24).kv.shape[-1] == 24


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lo.nn.FeatureMap(2, 4, activation="foo"), "activation is 'foo'"),
        (lambda: lo.nn.FeatureMap(2, 4, 8, skip=True), "skip needs f == D"),
        (
            lambda: lo.nn.LinearAttention(4, 3, 16),
            "LinearAttention: heads is 4, needs a multiple of kv_heads, 3",
        ),
        (lambda: lo.nn.HybridAttention(4, 2, 16, window=-3), "HybridAttention: window is -3"),
        (lambda: lo.nn.HybridAttention(4, 2, 16, window_kind="round"), "window_kind is 'round'"),
        (lambda: lo.nn.HybridAttention(4, 2, 16, affine=1), "affine is 1, needs a bool"),
        (
            lambda: lo.nn.HybridAttention(4, 2, 16, gate_init="x"),
            "gate_init is 'x', needs a number",
        ),
        (lambda: lo.nn.HybridAttention(4, 2, 16, gate_init=math.nan), "gate_init is nan"),
        (lambda: lo.nn.LinearAttention(4, 2.0, 16), "kv_heads is 2.0, needs an integer"),
        (lambda: lo.nn.FeatureMap("4", 16), "init_weight: heads is '4', needs an integer"),
        (lambda: lo.init_weight(2, -8, 64), "head_dim is -8, needs >= 1"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_built(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_the_projection_of_favor_is_one_and_stays(qkv):
    attention = lo.nn.LinearAttention(
        H, KV, D, activation="favor", init="orthogonal", share_kv_features=True
    )
    q, k = attention.feature_q.weight, attention.feature_k.weight
    assert q.equal(k.repeat_interleave(H // KV, 0))
    assert not q.requires_grad
    assert not k.requires_grad


class Continues(torch.nn.Module):
    """Attention on a state, which it returns as it is then; and steps on the state itself."""

    def __init__(self):
        super().__init__()
        self.attention = lo.nn.HybridAttention(H, KV, D, window=4, sink=1)

    def forward(self, state, q, k, v):
        out, then = self.attention(q, k, v, state=state, return_state=True)
        return out + self.attention.step_(q, k, v, state), then


@torch.no_grad()
def test_states_go_in_and_out_of_exported_programs(qkv, tmp_path):
    model = Continues().requires_grad_(False)
    empty = model.attention.empty_state(len(qkv[0]), slack=2)
    torch.export.save(torch.export.export(model, (empty, *qkv)), tmp_path / "program.pt2")
    stepped, want_stepped = empty.clone(), empty.clone()
    out, then = torch.export.load(tmp_path / "program.pt2").module()(stepped, *qkv)
    want_out, want_then = model(want_stepped, *qkv)
    assert (then.window, then.window_kind, then.slack) == (4, "sliding", 2)
    assert stepped.length.tolist() == [T] * len(out)
    torch.testing.assert_close(out, want_out)
    for got, want in ((then, want_then), (stepped, want_stepped)):
        torch.testing.assert_close(got.tensors, want.tensors)


def test_modules_with_real_parameters_take_fake_tensors(qkv):
    attention = lo.nn.HybridAttention(4, 2, 16, window=8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = attention(*(mode.from_tensor(x) for x in qkv))
    assert y.shape == qkv[0].shape[:3] + qkv[2].shape[3:]


def test_states_are_on_the_device_of_the_module():
    assert lo.nn.HybridAttention(4, 2, 16).to("meta").empty_state(1).kv.device.type == "meta"


def test_parameters_of_fp64_become_fp32_again():
    assert lo.nn.FeatureMap(2, 4).double().float().weight.dtype == torch.float32


@pytest.mark.parametrize("init", ["kaiming", "normal", "orthogonal"])
def test_initial_maps_are_the_generators(init):
    one, other = (
        lo.init_weight(8, 64, 16, init, generator=torch.Generator().manual_seed(0)) for _ in "ab"
    )
    assert one.equal(other)
    assert init != "normal" or abs(one.std().item() * 8 - 1) < 0.05
