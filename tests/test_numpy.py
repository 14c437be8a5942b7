"""The operators on NumPy arrays, and the switches of the C library."""

import ml_dtypes
import numpy as np
import pytest

from lolcats_ops import _C
from lolcats_ops import numpy as lnp

B, H, KV_HEADS, T, D, V, F = 2, 6, 2, 37, 16, 12, 8


@pytest.fixture(autouse=True, params=_C.cpu_isas())
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    q = normal(B, T, H, D).transpose(0, 2, 1, 3)
    maps = lnp.Features(normal(H, D, F)), lnp.Features(normal(KV_HEADS, D, F))
    return q, normal(B, KV_HEADS, T, D), normal(B, KV_HEADS, T, V), *maps, normal(H)


def phi(x, features):
    weight = np.repeat(features.weight, x.shape[1] // len(features.weight), axis=0)
    z = x.astype(np.float64) @ weight

    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    return np.concatenate([softmax(z), softmax(-z)], -1)


def hybrid(q, k, v, feature_q, feature_k, gate, window, sink):
    """SPEC 3 as it is written, O(T^2)."""
    group = q.shape[1] // k.shape[1]
    linear = phi(q, feature_q) @ np.repeat(phi(k, feature_k), group, 1).swapaxes(2, 3)
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = q.astype(np.float64) @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    i, j = np.ogrid[: q.shape[2], : q.shape[2]]
    near = (j <= i) & ((j > i - window) | (j < sink))
    scores = np.where(near, scores, -np.inf)
    g = 1 / (1 + np.exp(-gate.astype(np.float64)))[:, None, None]
    a = g * np.exp(scores - scores.max(-1, keepdims=True)) + np.where((j <= i) & ~near, linear, 0)
    return (a / a.sum(-1, keepdims=True)) @ v


def error(got, want):
    return np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)


def test_hybrid_attention_is_its_definition(case):
    out = lnp.hybrid_attention(*case, window=8, sink=1)
    assert error(out, hybrid(*case, window=8, sink=1)) < 1e-5
    assert out.transpose(0, 2, 1, 3).flags.c_contiguous  # the memory order of q


def test_feature_map_and_linear_attention_are_their_definitions(case):
    q, k, v, feature_q, feature_k, _ = case
    y = lnp.feature_map(q, feature_q)
    assert error(y, phi(q, feature_q)) < 1e-5
    out, (kv, ksum) = lnp.linear_attention(
        q, k, v, feature_q=feature_q, feature_k=feature_k, return_state=True
    )
    phi_k = phi(k, feature_k)
    scores = np.tril(phi(q, feature_q) @ np.repeat(phi_k, H // KV_HEADS, 1).swapaxes(2, 3))
    want = scores @ np.repeat(v, H // KV_HEADS, 1) / scores.sum(-1, keepdims=True)
    assert error(out, want) < 1e-5
    assert error(kv, phi_k.swapaxes(2, 3) @ v) < 1e-5
    assert error(ksum, phi_k.sum(2)) < 1e-5


def test_steps_on_a_state_equal_one_call(case):
    q, k, v, *rest = case
    state = lnp.HybridState.empty_for(k, v, rest[1], window=8, sink=1)
    parts = [
        lnp.hybrid_attention_step_(
            q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], *rest, state
        )
        for start, stop in ((0, 20), (20, 21), (21, T))
    ]
    assert error(np.concatenate(parts, 2), hybrid(*case, window=8, sink=1)) < 1e-5
    assert state.length.tolist() == [T] * B


def test_attention_transfer_measures_the_distance_to_softmax(case):
    transfer = lnp.attention_transfer(*case, window=8)
    teacher = hybrid(*case, window=T, sink=0)
    assert error(transfer.teacher, teacher) < 1e-5
    want = np.mean((hybrid(*case, window=8, sink=0) - teacher) ** 2)
    assert abs(transfer.mse - want) < 1e-5 * want


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), (ml_dtypes.bfloat16, 3.3e-3)])
def test_half_precision_arrays_keep_their_dtype(case, dtype, bound):
    q, k, v, *rest = case
    half = [x.astype(dtype) for x in (q, k, v)]
    out = lnp.hybrid_attention(*half, *rest, window=8)
    assert out.dtype == dtype
    assert error(out, hybrid(*(x.astype(np.float32) for x in half), *rest, 8, 0)) < bound


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"q": np.zeros((H, T, D), np.float32)}, ValueError, "q"),
        ({"q": np.zeros((B, H, T, D))}, TypeError, "float64"),
        ({"q": np.zeros((B, H, T, D), ">f4")}, TypeError, "native byte order"),
        ({"q": np.zeros((B, 0, T, D), np.float32)}, ValueError, "0 heads"),
        ({"k": np.zeros((B, 4, T, D), np.float32)}, ValueError, "4"),
        ({"v": np.zeros((B, KV_HEADS, T - 1, V), np.float32)}, ValueError, "v"),
        ({"window": -1}, ValueError, "window"),
        ({"window": "wide"}, TypeError, "window is 'wide', not an integer"),
        ({"window": 2**70}, ValueError, "window is 1180591620717411303424, beyond 64 bits"),
        ({"window": None}, TypeError, "window is missing, or None"),
        ({"window_kind": "round"}, ValueError, "hybrid_attention: window_kind is 'round'"),
        ({"gate": np.zeros(H - 1, np.float32)}, ValueError, "gate"),
        ({"cu_seqlens": np.array([0, T], np.int32)}, ValueError, "cu_seqlens"),
        ({"q": np.ma.masked_array(np.zeros((B, H, T, D), np.float32))}, TypeError, "masked"),
        ({"k": np.zeros((B, 5, T, D), np.float32)}, ValueError, "k has 5 heads, which does not"),
    ],
)
def test_wrong_arguments_are_named(case, change, exception, words):
    names = ("q", "k", "v", "feature_q", "feature_k", "gate")
    with pytest.raises(exception, match=words):
        lnp.hybrid_attention(**{**dict(zip(names, case, strict=True)), **change})


def test_empty_arrays_have_empty_results(case):
    q, k, v, *rest = case
    assert lnp.hybrid_attention(*(x[:, :, :0] for x in (q, k, v)), *rest, window=8).size == 0
    assert lnp.feature_map(q[:0], rest[0]).shape == (0, H, T, 2 * F)
    with pytest.raises(ValueError, match="cu_seqlens is empty"):
        lnp.hybrid_attention(q[:1], k[:1], v[:1], *rest, window=8, cu_seqlens=np.zeros(0, np.int32))


def test_read_only_state_is_refused_and_stays(case):
    q, k, v, *rest = case
    state = lnp.HybridState.empty_for(k, v, rest[1], window=8)
    state.kv.flags.writeable = False
    with pytest.raises(ValueError, match="kv is read-only"):
        lnp.hybrid_attention_step_(q, k, v, *rest, state)
    assert state.length.tolist() == [0] * B


def test_operators_take_keywords_and_refuse_unknown_ones(case):
    x, weight = case[1], case[4].weight
    settings = {"activation": 0, "two_sided": True, "skip": False, "feature_eps": 1e-12}
    y = _C.feature_map(x, weight=weight, **settings)
    np.testing.assert_array_equal(y, lnp.feature_map(x, case[4]))
    with pytest.raises(TypeError, match="x is of type list"):
        _C.feature_map([1.0], weight=weight, **settings)
    with pytest.raises(TypeError, match="weight is missing"):
        _C.feature_map(x)
    with pytest.raises(TypeError, match="unknown"):
        _C.feature_map(x, weight=weight, **settings, sharpness=1)


def test_unknown_instruction_set_is_refused_and_changes_nothing(isa):
    with pytest.raises(ValueError, match="abacus"):
        _C.set_cpu_isa("abacus")
    assert _C.cpu_isa() == isa


def test_scalar_code_runs_everywhere():
    assert "scalar" in _C.cpu_isas()
    assert _C.max_threads() >= 1


@pytest.mark.parametrize("wrong", [[[1.0]], None, 1.0, "x"])
@pytest.mark.parametrize("index", range(6))
def test_an_argument_of_another_type_is_named(case, index, wrong):
    arguments = list(case)
    arguments[index] = wrong
    name = ("q", "k", "v", "feature_q", "feature_k", "gate")[index]
    with pytest.raises(TypeError, match=rf"hybrid_attention: {name} is "):
        lnp.hybrid_attention(*arguments)


@pytest.mark.parametrize("wrong", [[[1.0]], np.ones((2, 3, 4), complex), np.full((2, 3, 4), "x")])
def test_parameters_are_real_arrays(wrong):
    with pytest.raises(TypeError, match=r"Features: weight (is of type list|has dtype)"):
        lnp.Features(wrong)
    with pytest.raises(TypeError, match=r"Features: bias (is of type list|has dtype)"):
        lnp.Features(np.ones((2, 3, 4)), wrong)


@pytest.mark.parametrize("name", ["two_sided", "skip"])
def test_flags_are_bools(name):
    with pytest.raises(TypeError, match=f"Features: {name} is 'no', needs a bool"):
        lnp.Features(np.ones((2, 3, 4)), **{name: "no"})


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"k": [[1.0]]}, TypeError, "k needs to be an array of 4 dimensions"),
        ({"v": np.zeros((B, KV_HEADS, T, V))}, TypeError, "v has dtype float64, needs float32, "),
        ({"v": np.zeros((B, H, T, V), np.float32)}, ValueError, f"v has {H} heads of float32"),
        ({"feature_k": None}, TypeError, "feature_k is of type NoneType"),
        ({"feature_k": lnp.Features(np.ones((H, D + 1, F)))}, ValueError, "feature_k has a weight"),
        *[
            ({name: -1}, ValueError, f"{name} is -1")
            for name in ("batch", "window", "sink", "slack")
        ],
        ({"v": np.zeros((B, KV_HEADS, T, V), np.float16)}, ValueError, "v has"),
        ({"feature_k": lnp.Features(np.ones((3, D, F)))}, ValueError, "feature_k has a weight"),
        ({"slack": True}, TypeError, "slack is True"),
        ({"window": 8.0}, TypeError, "window is 8.0, needs an integer"),
        ({"window_kind": "round"}, ValueError, "window_kind is 'round'"),
    ],
    ids=str,
)
def test_a_state_that_no_call_would_take_is_refused(case, change, exception, words):
    _, k, v, _, feature_k, _ = case
    arguments = {"k": k, "v": v, "feature_k": feature_k, "window": 8, **change}
    with pytest.raises(exception, match=rf"HybridState.empty_for: {words}"):
        lnp.HybridState.empty_for(**arguments)


class Convertible:
    """Like an array of JAX."""

    def __array__(self, dtype=None, copy=None):
        return np.ones((1, 1, 1), np.float32)


def test_what_numpy_can_convert_is_told_so():
    with pytest.raises(TypeError, match=r"weight is of type .*Convertible.*numpy\.asarray makes"):
        lnp.Features(Convertible())
    with pytest.raises(TypeError, match=r"x is of type .*Convertible.*numpy\.asarray makes"):
        lnp.feature_map(Convertible(), lnp.Features(np.asarray(Convertible())))
    with pytest.raises(TypeError, match="weight is a masked array"):
        lnp.Features(np.ma.masked_array(np.ones((1, 4, 4))))


def test_states_are_named_by_their_type(case):
    q = case[0]
    with pytest.raises(TypeError, match="state is of type NoneType, needs a HybridState"):
        lnp.hybrid_attention_step_(*case, None)
    with pytest.raises(TypeError, match=r"state needs to be a tuple \(kv, ksum\)"):
        lnp.linear_attention(q, q, q, state=3)


MASK = np.random.default_rng(1).random((B, T)) < 0.7


def of_torch(x):
    """An argument of lolcats_ops.numpy as one of lolcats_ops."""
    import torch

    import lolcats_ops as lo

    if isinstance(x, lnp.Features):
        bias = None if x.bias is None else torch.from_numpy(x.bias)
        weight = torch.from_numpy(x.weight)
        return lo.Features(weight, bias, x.activation, x.two_sided, x.skip, x.eps)
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize(
    "options",
    [
        {"affine": True, "sink": 3, "scale": 0.3},
        {"window_kind": "terrace", "window": 5, "key_padding_mask": MASK},
        {"window": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["hybrid_attention", "attention_transfer"])
@pytest.mark.parametrize("maps", [{}, {"eps": 0.1}, {"activation": "exp", "two_sided": False}])
def test_options_do_what_they_do_in_torch(case, op, options, maps):
    lo = pytest.importorskip("lolcats_ops")
    q, k, v, feature_q, feature_k, gate = case
    bias = np.ones((H, F), np.float32)
    arguments = (
        *(q, k, v),
        lnp.Features(feature_q.weight, bias, **maps),
        lnp.Features(feature_k.weight, bias[:KV_HEADS], **maps),
        gate,
    )
    options = {"window": 8, **options} | ({"xent": True} if op == "attention_transfer" else {})
    got = getattr(lnp, op)(*arguments, **options)
    want = getattr(lo, op)(
        *map(of_torch, arguments), **{name: of_torch(x) for name, x in options.items()}
    )
    if op == "hybrid_attention":
        assert np.array_equal(got, want.numpy())
    else:
        assert np.array_equal(got.teacher, want.teacher.numpy())
        assert (got.mse, got.xent) == (want.mse.item(), want.xent.item())


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"affine": True, "scale": 0.3}, {"window": 8, "sink": 1, "slack": 8}),
        ({}, {"window": 8, "window_kind": "terrace", "sink": 1}),
    ],
)
def test_steps_of_a_pool_do_what_they_do_in_torch(case, options, windows):
    lo = pytest.importorskip("lolcats_ops")
    q, k, v, feature_q, feature_k, gate = case
    slots = np.array([3, 1])
    state = lnp.HybridState.empty_for(k, v, feature_k, batch=4, **windows)
    pool = lo.HybridState.empty_for(*map(of_torch, (k, v, feature_k)), batch=4, **windows)
    for start, stop in ((0, 20), (20, 21), (21, T)):
        rows = [x[:, :, start:stop] for x in (q, k, v)]
        got = lnp.hybrid_attention_step_(
            *rows, feature_q, feature_k, gate, state, state_indices=slots, **options
        )
        want = lo.hybrid_attention_step_(
            *map(of_torch, (*rows, feature_q, feature_k, gate)),
            pool,
            state_indices=of_torch(slots),
            **options,
        )
        assert np.array_equal(got, want.numpy())
    assert list(state.arrays) == list(pool.tensors)
    for name, array in state.arrays.items():
        assert np.array_equal(array, pool.tensors[name].numpy())


def test_linear_attention_takes_every_option(case):
    q, k, v, feature_q, feature_k, _ = case
    maps = {"feature_q": feature_q, "feature_k": feature_k}
    whole, (kv, ksum) = lnp.linear_attention(q, k, v, **maps, return_state=True)
    first, state = lnp.linear_attention(
        q[:, :, :20], k[:, :, :20], v[:, :, :20], **maps, return_state=True
    )
    then, state = lnp.linear_attention(
        q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], **maps, state=state, return_state=True
    )
    np.testing.assert_allclose(np.concatenate((first, then), 2), whole, rtol=1e-4, atol=1e-5)
    for sums, of_whole in zip(state, (kv, ksum), strict=True):
        np.testing.assert_allclose(sums, of_whole, rtol=1e-4, atol=1e-5)
    sums = lnp.linear_attention(q, k, v, **maps, normalize=False)
    ones = lnp.linear_attention(q, k, np.ones_like(v), **maps, normalize=False)
    np.testing.assert_allclose(sums / ones, whole, rtol=1e-4, atol=1e-5)
    damped = lnp.linear_attention(q, k, v, **maps, eps=2.0)
    np.testing.assert_allclose(damped, sums / (ones + 2), rtol=1e-4, atol=1e-5)
    masked = lnp.linear_attention(q, k, v, **maps, key_padding_mask=MASK)
    assert not masked.swapaxes(1, 2)[~MASK].any()
    row = MASK[0]
    alone = lnp.linear_attention(q[:1, :, row], k[:1, :, row], v[:1, :, row], **maps)
    np.testing.assert_allclose(masked[:1, :, row], alone, rtol=1e-5, atol=1e-6)


@pytest.fixture
def small():
    """q of 4 heads, k and v of 2, 9 tokens of 8 numbers."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 4, 9, 8), np.float32)
    return q, *rng.standard_normal((2, 1, 2, 9, 8), np.float32)


def eye(heads, **kind):
    return lnp.Features(np.eye(8)[None].repeat(heads, 0), **kind)


def test_maps_and_sums_of_states_go_together(small):
    for one in ("feature_q", "feature_k"):
        with pytest.raises(ValueError, match="go together"):
            lnp.linear_attention(*small, **{one: eye(2)})
    with pytest.raises(ValueError, match="differ in activation"):
        lnp.linear_attention(*small, feature_q=eye(2), feature_k=eye(2, activation="exp"))
    with pytest.raises(TypeError, match="state needs to be a tuple"):
        lnp.linear_attention(*small, state=(1, 2, 3))


def test_one_sided_maps_are_one_sided_by_default(small):
    q, k, v = small
    phi = eye(2, activation="relu")
    assert phi.out_features == 8
    np.testing.assert_allclose(lnp.feature_map(k, phi), k.clip(1e-12))
    state = lnp.HybridState.empty_for(k, v, phi, window=4)
    y = lnp.hybrid_attention_step_(q, k, v, eye(4, activation="relu"), phi, np.zeros(4), state)
    assert y.shape == q.shape


@pytest.mark.parametrize("op", ["hybrid_attention", "attention_transfer"])
def test_packed_documents_are_apart(op, small):
    def call(*qkv, **options):
        y = getattr(lnp, op)(*qkv, eye(4), eye(2), np.zeros(4), window=2, **options)
        return y if op == "hybrid_attention" else y.teacher

    packed = call(*small, cu_seqlens=np.array([0, 4, 9]))
    second = call(*(x[:, :, 4:] for x in small))
    np.testing.assert_allclose(packed[:, :, 4:], second, rtol=1e-5, atol=1e-6)


def test_a_scale_of_0_is_none_and_weights_may_be_transposed(small):
    q, k, v = small
    weight = np.random.default_rng(1).standard_normal((4, 8, 8), np.float32)
    phi = lnp.Features(weight)
    got = lnp.hybrid_attention(q, k, v, phi, phi, np.zeros(4), window=9, scale=0.0)
    want = lnp.hybrid_attention(q * 0, k, v, phi, phi, np.zeros(4), window=9)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    flipped = lnp.Features(np.ascontiguousarray(weight.swapaxes(1, 2)).swapaxes(1, 2))
    np.testing.assert_array_equal(lnp.feature_map(q, flipped), lnp.feature_map(q, phi))


def test_sizes_of_few_bits_do_not_overflow(small):
    _, k, v = small
    sizes = {"window": np.int8(100), "window_kind": "terrace", "slack": np.int8(100)}
    assert lnp.HybridState.empty_for(k, v, eye(2), **sizes).k_ring.shape[2] == 300
