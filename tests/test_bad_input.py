"""Bad input: an error that names argument, value and need, and nothing changed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lolcats_ops as lo
from lolcats_ops.features import Features, init_weight
from lolcats_ops.state import HybridState

B, H, HK, T, D, V, f = 2, 8, 4, 6, 16, 12, 8


def good(**changes):
    """Arguments of hybrid_attention, with changes."""
    arguments = {
        "q": torch.randn(B, H, T, D),
        "k": torch.randn(B, HK, T, D),
        "v": torch.randn(B, HK, T, V),
        "feature_q": Features(init_weight(H, D, f)),
        "feature_k": Features(init_weight(HK, D, f)),
        "gate": torch.zeros(H),
    }
    return {**arguments, **changes}


def empty(dtype=torch.float32, **changes):
    sizes = {"heads": HK, "kv_heads": HK, "head_dim": D, "value_dim": V, "feature_dim": 2 * f}
    settings = {"batch": B, "window": 4, **sizes, **changes}
    return HybridState.empty(**settings, dtype=dtype)


nan = float("nan")
ATTENTION = [
    ({"q": torch.randn(B, H, D)}, "q has shape [2, 8, 16], needs 4 dimensions"),
    ({"q": [1.0]}, "q is a list, needs a tensor"),
    ({"q": torch.ones(B, H, T, D, dtype=torch.int32)}, "q is int32, needs a floating dtype"),
    ({"k": torch.randn(B, 3, T, D)}, "k has 3 heads, which does not divide q's 8"),
    ({"k": torch.randn(B, HK, T + 1, D)}, "k has shape [2, 4, 7, 16], needs [B, Hk, T, D]"),
    ({"k": torch.randn(B, HK, T, D + 1)}, "k has head dim 17, needs q's 16"),
    ({"k": torch.randn(B, HK, T, D).bfloat16()}, "k is bfloat16, needs q's float32"),
    ({"k": torch.randn(B, HK, T, D, device="meta")}, "k is on meta, needs q's cpu"),
    ({"v": torch.randn(B, 2, T, V)}, "v has shape [2, 2, 6, 12], needs [B, Hk, T, V]"),
    ({"v": torch.randn(B, HK, T, 0)}, "v has shape [2, 4, 6, 0], needs a last dimension"),
    ({"q": torch.randn(B, 0, T, D)}, "q has shape [2, 0, 6, 16], needs at least one head"),
    ({"feature_q": torch.ones(1)}, "feature_q is a Tensor, needs Features"),
    ({"feature_q": Features(init_weight(2, D, f))}, "feature_q has 2 heads, needs q's 8 or k's 4"),
    ({"feature_k": Features(init_weight(H, 7, f))}, "feature_k.weight has D=7, needs the head dim"),
    ({"feature_k": Features(init_weight(H, D, 9))}, "feature_k has (activation, two_sided, skip"),
    ({"feature_k": Features(init_weight(H, D, f).int())}, "feature_k.weight is int32"),
]
LINEAR = [
    ({"feature_q": None}, "feature_q is None, needs both feature maps or neither"),
    ({"feature_k": None}, "feature_k is None, needs both feature maps or neither"),
    ({"normalize": 1}, "normalize is 1, needs a bool"),
]
HYBRID = [
    ({"feature_q": None, "feature_k": None}, "feature_q is None, needs Features"),
    ({"feature_k": None}, "feature_k is None, needs Features"),
    ({"affine": "yes"}, "affine is 'yes', needs a bool"),
    ({"affine": 1}, "affine is 1, needs a bool"),
    ({"gate": torch.zeros(HK)}, "gate has shape [4], needs [H] = [8]"),
    ({"gate": 0.5}, "gate is a float, needs a tensor"),
    ({"gate": torch.tensor([nan] * H)}, "gate is [nan, "),
    ({"gate": torch.tensor([float("inf")] * H)}, "needs finite numbers"),
    ({"window": -1}, "window is -1, needs >= 0"),
    ({"sink": -2}, "sink is -2, needs >= 0"),
    ({"window_kind": "round"}, "window_kind is 'round', needs one of sliding, terrace"),
    ({"window": "16"}, "window is '16', needs an integer"),
    ({"sink": None}, "sink is None, needs an integer"),
    ({"window": True}, "window is True, needs an integer"),
    ({"window": 1 << 70}, f"window is {1 << 70}, needs an int64"),
    ({"scale": "x"}, "scale is 'x', needs a number"),
]
SEQUENCES = [
    ({"key_padding_mask": torch.ones(B, T + 1, dtype=torch.bool)}, "key_padding_mask has shape"),
    ({"key_padding_mask": torch.ones(B, T)}, "key_padding_mask is float32, needs bool"),
    ({"cu_seqlens": [0, T]}, "cu_seqlens is a list, needs a tensor"),
    ({"cu_seqlens": torch.tensor([0, T])}, "cu_seqlens is given and B is 2, needs the sequences"),
    ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "cu_seqlens has shape [2, 2]"),
    ({"backend": "quantum"}, "backend is 'quantum', needs one of cpu, cuda, triton, reference"),
    ({"backend": "cuda"}, "no backend for this case: cuda: it runs on cuda, not on cpu"),
]
STATES = [
    ({"state": empty(batch=3)}, "state.kv has shape [3, 4, 16, 12], needs [2, 4, 16, 12]"),
    ({"state": empty(heads=H)}, "state.kv has shape [2, 8, 16, 12]"),
    ({"state": empty(head_dim=8)}, "state.k_ring has shape [2, 4, 4, 8]"),
    ({"state": empty(torch.bfloat16)}, "state.k_ring is bfloat16, needs q's float32"),
    ({"state": replace(empty(), kv=empty().kv.half())}, "state.kv is float16, needs float32"),
    ({"state": replace(empty(), ksum=empty().ksum.double())}, "state.ksum is float64, needs"),
    (
        {"state": replace(empty(), folded=empty().folded.int())},
        "state.folded is int32, needs int64",
    ),
    ({"state": {}}, "state is a dict, needs a HybridState"),
]


def refused(op, changes, message):
    """The call fails with this message, and neither inputs nor state have changed."""
    arguments = good(**changes)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor) and not x.is_meta]
    if isinstance(arguments.get("state"), HybridState):
        tensors += arguments["state"].tensors.values()
    before = [x.clone() for x in tensors]
    with pytest.raises((ValueError, TypeError)) as error:
        getattr(lo, op)(**arguments)
    assert str(error.value).startswith(f"{op}: ")
    assert message in str(error.value)
    for x, was in zip(tensors, before, strict=True):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("changes", "message"), [*ATTENTION, *HYBRID, *SEQUENCES])
@pytest.mark.parametrize("op", ["hybrid_attention", "attention_transfer"])
def test_attention_names_what_is_wrong(op, changes, message):
    refused(op, changes, message)


@pytest.mark.parametrize(("changes", "message"), [*ATTENTION, *LINEAR, *SEQUENCES])
def test_linear_attention_names_what_is_wrong(changes, message):
    arguments = good(**changes)
    del arguments["gate"]
    with pytest.raises((ValueError, TypeError)) as error:
        lo.linear_attention(**arguments)
    assert str(error.value).startswith("linear_attention: ")
    assert message in str(error.value)


@pytest.mark.parametrize(("changes", "message"), [*ATTENTION, *HYBRID[:7], *STATES])
def test_step_names_what_is_wrong_and_leaves_the_state(changes, message):
    refused("hybrid_attention_step_", {"state": empty(), **changes}, message)


@pytest.mark.parametrize(("changes", "message"), STATES)
def test_hybrid_attention_refuses_a_state_from_other_shapes(changes, message):
    refused("hybrid_attention", {"window": 4, **changes}, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 5}, "state has window 4, needs 5"),
        ({"window": 4, "window_kind": "terrace"}, "state has window_kind 'sliding'"),
        ({"window": 4, "sink": 1}, "state has sink 0, needs 1"),
    ],
)
def test_hybrid_attention_refuses_a_state_of_another_window(changes, message):
    refused("hybrid_attention", {"state": empty(), **changes}, message)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0]), "state_indices has shape [1], needs [B] = [2]"),
        (torch.tensor([0.0, 1.0]), "state_indices is float32, needs int32 or int64"),
        ([0, 1], "state_indices is a list, needs a tensor"),
    ],
)
def test_step_refuses_bad_indices(indices, message):
    refused("hybrid_attention_step_", {"state": empty(), "state_indices": indices}, message)


@pytest.mark.parametrize("other", [{"activation": "exp"}, {"two_sided": False}, {"eps": 0.1}])
def test_step_refuses_maps_of_two_kinds(other):
    feature_k = Features(init_weight(HK, D, f), **other)
    message = "feature_k has (activation, two_sided, skip"
    refused("hybrid_attention_step_", {"state": empty(), "feature_k": feature_k}, message)


@pytest.mark.parametrize("changes", [{"slack": 3}, {"sink": 1}])
def test_linear_attention_refuses_a_state_that_keeps_keys(changes):
    arguments = good(state=empty(window=0, **changes))
    del arguments["gate"]
    with pytest.raises(ValueError, match=r"linear_attention: state has (ring 3|sink 1), needs 0"):
        lo.linear_attention(**arguments)


@pytest.mark.parametrize("indices", [[0, 0], [0, 2], [-1, 0]])
def test_step_refuses_slots_that_do_not_exist_or_come_twice(indices):
    state = empty()
    before = state.clone()
    for backend in ("cpu", "reference"):
        options = {"state_indices": torch.tensor(indices), "backend": backend}
        with pytest.raises(ValueError, match="state_indices"):
            lo.hybrid_attention_step_(**good(), state=state, **options)
    for name, was in before.tensors.items():
        assert torch.equal(state.tensors[name], was)


@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize(
    ("length", "folded"),
    [(-5, 0), (-5, -5), (0, 5), (5, 0), (2**62, 0), (2**63 - 1, 2**63 - 1), (20, 20)],
)
def test_step_refuses_counters_that_no_state_has(length, folded, tokens):
    state = empty()
    state.length[1], state.folded[1] = length, folded
    before = state.clone()
    arguments = good()
    arguments |= {name: arguments[name][:, :, :tokens] for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=r"state\.length\[1\] is"):
        lo.hybrid_attention_step_(**arguments, state=state)
    for name, was in before.tensors.items():
        assert torch.equal(state.tensors[name], was)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bounds", [[1, 6], [0, 5, 3, 6], [0, 7]])
def test_bounds_that_are_not_a_partition_are_refused(bounds, backend):
    one = good(q=torch.randn(1, H, T, D), k=torch.randn(1, HK, T, D), v=torch.randn(1, HK, T, V))
    with pytest.raises(ValueError, match="cu_seqlens"):
        lo.hybrid_attention(**one, cu_seqlens=torch.tensor(bounds), backend=backend)


def test_a_state_is_inference_only():
    arguments = good(gate=torch.zeros(H, requires_grad=True))
    state = empty()
    state.kv.requires_grad_()
    for call in (
        lambda: lo.hybrid_attention_step_(**arguments, state=empty()),
        lambda: lo.hybrid_attention(**arguments, return_state=True),
        lambda: lo.hybrid_attention_step_(**good(), state=state),
        lambda: lo.hybrid_attention(**good(), state=state, window=4),
    ):
        with pytest.raises(ValueError, match=r"inference only: call it under torch\.no_grad"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_a_graph_notices_that_a_step_has_written_what_it_saved(backend):
    state, factor = empty(), torch.ones(1, requires_grad=True)
    products = [(factor * x).sum() for x in (state.kv, state.k_ring)]
    lo.hybrid_attention_step_(**good(), state=state, backend=backend)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_a_scale_to_be_trained_is_refused():
    scale = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match="scale is a tensor that requires grad, needs a number"):
        lo.hybrid_attention(**good(), scale=scale)
    q = good()["q"]
    for name in ("scale", "eps"):
        with pytest.raises(TypeError, match=f"{name} is a tensor that requires grad"):
            lo.linear_attention(q, q, q, **{name: scale})


@pytest.mark.parametrize("number", [nan, float("inf"), 1e39])
def test_numbers_that_float32_does_not_hold_are_refused(number):
    with pytest.raises(ValueError, match="hybrid_attention: scale is"):
        lo.hybrid_attention(**good(), scale=number)
    with pytest.raises(ValueError, match="hybrid_attention_step_: scale is"):
        lo.hybrid_attention_step_(**good(), state=empty(), scale=number)
    q = good()["q"]
    for name in ("scale", "eps"):
        with pytest.raises(ValueError, match=f"{name} is"):
            lo.linear_attention(q, q, q, **{name: number})
    with pytest.raises(ValueError, match="eps is"):
        lo.Features(torch.ones(2, 4, 4), eps=number)
    with pytest.raises(ValueError, match=r"eps is -1\.0, needs a finite number of float32, >= 0"):
        lo.linear_attention(q, q, q, eps=-1.0)


@pytest.mark.parametrize("method", ["select", "reset"])
@pytest.mark.parametrize("indices", [torch.tensor([False, True]), torch.tensor([1.7]), [1]])
def test_slots_are_named_by_integers(method, indices):
    state = empty()
    state.kv.fill_(1)
    with pytest.raises(
        TypeError, match=rf"HybridState\.{method}: indices is .*, needs a tensor of"
    ):
        getattr(state, method)(indices)
    assert (state.kv == 1).all()


@pytest.mark.parametrize("size", ["batch", "heads", "kv_heads", "head_dim", "value_dim", "slack"])
def test_a_state_of_a_negative_size_is_refused(size):
    with pytest.raises(ValueError, match=f"empty: {size} is -1, needs >= 0"):
        empty(**{size: -1})


def test_unsupported_cases_say_what_would_work():
    double = {n: x.double() if n in "qkv" else x for n, x in good().items()}
    with pytest.raises(ValueError, match="not float64; backend='reference' runs it"):
        lo.hybrid_attention(**double)
    assert lo.hybrid_attention(**double, backend="reference").dtype == torch.float64
    wide = good(
        q=torch.randn(B, H, T, 300),
        k=torch.randn(B, HK, T, 300),
        feature_q=Features(init_weight(H, 300, f)),
        feature_k=Features(init_weight(H, 300, f)),
    )
    with pytest.raises(ValueError, match="up to 256, not 300"):
        lo.hybrid_attention(**wide)
    maps = {n: Features(init_weight(H, D, 257)) for n in ("feature_q", "feature_k")}
    with pytest.raises(ValueError, match="maps up to 256 wide, not 257"):
        lo.hybrid_attention(**good(**maps))
    assert lo.backend_for("feature_map", feature_dim=257).backend is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "weight has shape [2, 3], needs [Hf, D, f]"),
        ({"weight": 3}, "weight is a int, needs a tensor"),
        ({"activation": "gelu"}, "activation is 'gelu', needs one of softmax, exp, elu1"),
        ({"bias": torch.ones(3)}, "bias has shape [3], needs [Hf, f] = [2, 5]"),
        ({"skip": True}, "skip needs f == D, but weight has D=4, f=5"),
        ({"activation": "favor", "bias": torch.ones(2, 5)}, "favor takes neither bias nor skip"),
        ({"eps": -1.0}, "eps is -1.0, needs a finite number"),
        ({"eps": float("inf")}, "eps is inf, needs a finite number"),
        ({"eps": None}, "eps is None, needs a number"),
        ({"bias": [1.0]}, "bias is a list, needs a tensor"),
        ({"two_sided": "no"}, "two_sided is 'no', needs a bool"),
        ({"weight": torch.ones(0, 4, 5)}, "weight has shape [0, 4, 5], needs no 0 in it"),
    ],
)
def test_features_name_what_is_wrong(arguments, message):
    with pytest.raises((ValueError, TypeError)) as error:
        Features(**{"weight": torch.ones(2, 4, 5), **arguments})
    assert message in str(error.value)


def test_feature_map_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="features has 3 heads, which does not divide"):
        lo.feature_map(torch.randn(B, H, T, D), Features(init_weight(3, D, f)))


def test_meta_tensors_have_shapes_alone():
    on_meta = {n: x.to("meta") for n, x in good().items() if isinstance(x, torch.Tensor)}
    features = {n: Features(x.weight.to("meta")) for n, x in good().items() if "feature" in n}
    y = lo.hybrid_attention(**{**good(), **on_meta, **features})
    assert (y.is_meta, y.shape) == (True, (B, H, T, V))


def test_large_gates_and_integers_of_numpy_are_good():
    x = good(gate=torch.full((H,), 3e38), window=np.int64(3))
    assert lo.hybrid_attention(**x).isfinite().all()


@pytest.mark.parametrize("like", [torch.bfloat16, torch.ones(1, dtype=torch.bfloat16), 1.5])
def test_a_state_is_not_cast(like):
    with pytest.raises(TypeError, match=f"got {type(like).__name__}, needs a device"):
        empty().to(like)


@pytest.mark.parametrize("name", ["window", "sink", "slack", "batch"])
def test_state_refuses_negative_sizes(name):
    with pytest.raises(ValueError, match=f"{name} is -1, needs >= 0"):
        empty(**{name: -1})
