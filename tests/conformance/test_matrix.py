"""Every operator, forward and backward, on every backend, against the fp64 reference (SPEC 9)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.cases import FACTORS, Case, cases
from helpers.kernels import ALL, CPU, INTERPRETED, KERNELS
from helpers.operators import (
    BOUNDLESS,
    HYBRID,
    LINEAR_KEYS,
    MAPS,
    SEQUENCES,
    attention_transfer,
    check,
    check_gate,
    check_spread,
    check_transfer,
    damped_linear_attention,
    feature_map,
    hybrid_attention,
    linear_attention,
)

import lolcats_ops as lo


def matrix(*factors: str, **others: tuple) -> pytest.MarkDecorator:
    """All cases on all backends; the quadratic reference itself is spared the long ones."""
    pairs = [
        pytest.param(case, backend, id=f"{backend}-{case}")
        for case in cases(*factors, **others)
        for backend in ALL
        if backend != "reference" or case.T <= 128
    ]
    return pytest.mark.parametrize(("case", "backend"), pairs, indirect=["backend"])


@matrix(*MAPS, "activation", length=("0", "1", "3w+7"))
def test_feature_map_equals_the_reference(case, backend, device):
    check(feature_map, case, backend, device)


@matrix(*MAPS, *SEQUENCES, "normalize", "initial", activation=(*FACTORS["activation"], None))
def test_linear_attention_equals_the_reference(case, backend, device):
    check(linear_attention, case, backend, device)


@matrix(*HYBRID)
def test_hybrid_attention_equals_the_reference(case, backend, device):
    check(hybrid_attention, case, backend, device)


@matrix(*HYBRID, "xent")
def test_attention_transfer_equals_the_reference(case, backend, device):
    check_transfer(case, backend, device)


@pytest.mark.parametrize("backend", ALL, indirect=True)
@pytest.mark.parametrize("case", LINEAR_KEYS, ids=str)
def test_attention_transfer_has_gradients_of_linear_keys(case, backend, device):
    check_transfer(case, backend, device)


@pytest.mark.parametrize("call", [feature_map, hybrid_attention, attention_transfer])
def test_gradients_that_are_off_are_noticed(call):
    """In fp32 by 1e-4, of every parameter."""

    def off(ops, x, **options):
        outputs = call(ops, x, **options)
        wrong = 1e-4 * (ops is not lo.reference)
        return {n: y + wrong * (y - y.detach()) for n, y in outputs.items()}

    with pytest.raises(AssertionError, match=r"^d\w+: error .* > 2.0e-05"):
        check(off, Case("3w+7", xent=True), "cpu")


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("call", "activation", "two_sided"),
    [
        (linear_attention, "softmax", True),
        (linear_attention, "softmax", False),
        (hybrid_attention, "softmax", True),
        (hybrid_attention, "exp", False),
        (attention_transfer, "exp", False),
    ],
)
def test_widths_are_odd(call, backend, device, dtype, activation, two_sided):
    widths = {"D": 15, "V": 17, "f": 9}
    maps = {"activation": activation, "two_sided": two_sided, "bias": True}
    check(call, Case("3w+7", **widths, **maps, G=2, dtype=dtype), backend, device)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("D", [64, 15])
@pytest.mark.parametrize(
    ("call", "activation"),
    [(linear_attention, "relu"), (hybrid_attention, "relu"), (hybrid_attention, "exp")],
)
def test_gradients_see_weights_that_bf16_does_not_hold(call, activation, D, backend, device):
    """Rounded, another z would be the largest, or above zero, for some tokens."""
    maps = {"activation": activation, "two_sided": False, "f": 64}
    case = Case("500", D=D, batch=(1, 2), **maps, trained=True, dtype=torch.bfloat16)
    check(call, case, backend, device)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("f", [5, 16, 24, 32, 64])  # 16, 32, 64 are four vectors, by the lanes
def test_feature_map_is_exact_however_far_apart_its_features_are(
    backend, device, activation, two_sided, f
):
    """Each token spreads its ``z`` over another range, up to where exponentials leave fp32; one
    entry, another one in each token, is at its end."""
    rng = torch.Generator().manual_seed(f)
    ranges = torch.tensor([1.0, 40.0, 79.9, 80.1, 87.0, 161.0, 1000.0]).repeat(2 * f)
    ranges[::2] *= -1
    z = (2 * torch.rand(len(ranges), f, generator=rng) - 1) * ranges[:, None]
    tokens = torch.arange(len(ranges))
    z[tokens, tokens // 7 % f] = ranges
    z = z[None, None]
    weight = torch.eye(f)[None]  # z is x, without a rounding
    got, want = (
        ops.feature_map(
            z.to(dtype), lo.Features(weight.to(dtype), None, activation, two_sided), **options
        )
        for ops, dtype, options in (
            (lo, torch.float32, {"backend": backend}),
            (lo.reference, torch.float64, {}),
        )
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
@pytest.mark.parametrize("far", [9.9, 10.1, 79.9, 80.1, 1000.0])
def test_features_of_attention_are_exact_however_far_apart_they_are(
    backend, device, two_sided, far, eps
):
    """With lanes along tokens. A sum over a sequence's keys shows their features; one key of each
    sequence, another one in each, has an entry far from the others."""
    f, T = 5, 34
    k = torch.randn(T, 1, T, f, generator=torch.Generator().manual_seed(0))
    k[torch.arange(T), :, torch.arange(T), 2] = far
    features = lo.Features(torch.eye(f)[None], None, "softmax", two_sided, eps=eps)
    exact = replace(features, weight=features.weight.double())
    want = lo.reference.feature_map(k.double(), exact)
    _, state = lo.linear_attention(
        k, k, k, feature_q=features, feature_k=features, return_state=True, backend=backend
    )
    torch.testing.assert_close(state.ksum.double(), want.sum(2), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "exp", "elu1", "relu"])
@pytest.mark.parametrize("op", ["feature_map", "hybrid_attention", "attention_transfer"])
def test_gradients_are_exact_however_many_features_are_clamped(backend, device, activation, op):
    """With eps = 0.1 most of 16 probabilities are below it, and still have gradients."""
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 70, 16, generator=rng) for _ in range(4)]
    inputs.append(torch.randn(2, 16, 16, generator=rng) / 4)

    def gradients(dtype, where):
        q, k, v, dy, weight = (x.to(dtype) for x in inputs)
        phi = lo.Features(weight.requires_grad_(), activation=activation, eps=0.1)
        options = {"window": 16, "backend": where}
        gate = torch.zeros(2, dtype=dtype)
        if op == "attention_transfer":
            loss = lo.attention_transfer(q, k, v, phi, phi, gate, xent=True, **options).xent
            return torch.autograd.grad(loss, weight)
        if op == "feature_map":
            y = lo.feature_map(q.requires_grad_(), phi, backend=where)[..., :16]
            return torch.autograd.grad(y, (q, weight), dy)
        y = lo.hybrid_attention(
            q.requires_grad_(), k.requires_grad_(), v, phi, phi, gate, **options
        )
        return torch.autograd.grad(y, (q, k, weight), dy)

    results = gradients(torch.float32, backend), gradients(torch.float64, "reference")
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("backend", [*CPU, *INTERPRETED], indirect=True)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 6.6e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize(
    ("window", "common", "D"),
    [(0, 1, 32), (16, 1, 32), (250, 1, 32), (600, 1, 32), (0, 4, 64), (16, 4, 64)],
)
def test_what_values_have_in_common_does_not_drown_gradients(
    backend, device, dtype, bound, window, common, D
):
    """y is rounded to 16 bits, and so is kv where products are by pairs; gradients are differences
    of products with them."""
    rng = torch.Generator().manual_seed(0)
    T = max(300, window + 100)
    q, k, v, dy = (torch.randn(1, 2, T, D, generator=rng) for _ in range(4))
    v += common * torch.randn(1, 2, 1, D, generator=rng)
    weights = [torch.randn(2, D, D, generator=rng) * D**-0.5 for _ in "qk"]

    def gradients(computed, parameter_dtype, where):
        *inputs, out = (x.to(dtype).to(computed) for x in (q, k, v, dy))
        leaves = [*inputs, *(x.to(parameter_dtype) for x in (*weights, torch.zeros(2)))]
        leaves = [x.requires_grad_() for x in leaves]
        maps = lo.Features(leaves[3]), lo.Features(leaves[4])
        y = lo.hybrid_attention(*leaves[:3], *maps, leaves[5], window=window, backend=where)
        return torch.autograd.grad(y, leaves, out)

    results = (
        gradients(dtype, torch.float32, backend),
        gradients(torch.float64, torch.float64, "reference"),
    )
    for name, got, want in zip(("q", "k", "v", "Wq", "Wk", "gate"), *results, strict=True):
        assert (got - want).norm() <= bound * want.norm(), name


@pytest.mark.parametrize("backend", [*CPU, *INTERPRETED], indirect=True)
def test_a_long_past_does_not_drown_gradients(backend, device):
    """kv is rounded to 16 bits less ksum times a mean of its values, which a hundred new tokens do
    not tell for sixteen thousand."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(1, 2, 100, 32, generator=rng).bfloat16() for _ in range(4))
    keys, values = torch.randn(2, 1, 2, 16_000, 32, generator=rng)
    weight = torch.randn(2, 32, 32, generator=rng) / 6
    phi = lo.reference.feature_map(keys, lo.Features(weight))
    sums = phi.mT @ values, phi.sum(2)

    def gradients(computed, parameter_dtype, where):
        leaves = [*(x.to(computed) for x in (q, k, v)), weight.to(parameter_dtype)]
        leaves = [x.requires_grad_() for x in leaves]
        state = lo.HybridState.of_sums(
            *(x.to(parameter_dtype) for x in sums),
            torch.tensor([16_000]),
            head_dim=32,
            kv_heads=2,
            dtype=computed,
        )
        maps = dict.fromkeys(("feature_q", "feature_k"), lo.Features(leaves[3]))
        y = lo.linear_attention(*leaves[:3], **maps, state=state, backend=where)
        return torch.autograd.grad(y, leaves, dy.to(computed))

    results = (
        gradients(torch.bfloat16, torch.float32, backend),
        gradients(torch.float64, torch.float64, "reference"),
    )
    for name, got, want in zip(("q", "k", "v", "W"), *results, strict=True):
        assert (got - want).norm() <= 6.6e-3 * want.norm(), name


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("scale", [1.1e2, 1.1e4, 1.1e6, 1.1e8])
def test_the_largest_of_huge_scores_takes_all_of_the_weight(backend, device, scale):
    """exp of what is left when a maximum is taken from itself is 1, however large the maximum."""
    rng = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 2, 70, 16, generator=rng), dim=-1)
    v, dy = (torch.randn(1, 2, 70, 16, generator=rng) for _ in range(2))
    options = {"window": 16, "scale": scale}

    def results(dtype, where):
        keys, values, weight = (x.to(dtype) for x in (k, v, torch.zeros(2, 16, 16)))
        phi, gate = lo.Features(weight), torch.full((2,), 20.0, dtype=dtype)
        arguments = (keys, keys, values.requires_grad_(), phi, phi, gate)
        y = lo.hybrid_attention(*arguments, **options, backend=where)
        teacher = lo.attention_transfer(*arguments, **options, backend=where).teacher
        return y.detach(), *torch.autograd.grad(y, values, dy.to(dtype)), teacher

    both = results(torch.float32, backend), results(torch.float64, "reference")
    for got, want in zip(*both, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_a_relu_of_few_features_is_as_exact_as_others(backend, device):
    """Rounded weights would move z across 0."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 16, generator=rng).bfloat16() for _ in range(3))
    weight = torch.randn(4, 16, 4, generator=rng) / 4
    outputs = []
    for dtype, parameter_dtype, where in (
        (torch.bfloat16, torch.float32, backend),
        (torch.float64, torch.float64, "reference"),
    ):
        phi = lo.Features(weight.to(parameter_dtype), activation="relu", eps=1e-4)
        x = (t.to(dtype) for t in (q, k, v))
        gate = torch.zeros(4, dtype=parameter_dtype)
        outputs.append(lo.hybrid_attention(*x, phi, phi, gate, window=0, backend=where))
    assert (outputs[0] - outputs[1]).norm() <= 3.3e-3 * outputs[1].norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("spread", [1.0, 1.4, 2.0, 6.0])
@pytest.mark.parametrize("sizes", [(64, 64), (16, 4), (60, 24)])
def test_maps_that_spread_z_keep_bf16_exact(sizes, spread, window, backend, device):
    gradients = sizes != (16, 4)  # with so few features dk is a difference of large sums
    attention = partial(lo.hybrid_attention, backend=backend)
    check_spread(attention, spread, sizes, device, gradients=gradients, window=window)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_only_equal_entries_share_the_gradient_of_a_maximum(backend, device, activation):
    """Scores and ``z`` of small q and k differ by less than exponentials can tell."""
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 70, 16, generator=rng) for _ in range(4)]
    inputs[:2] = (x * 1e-4 for x in inputs[:2])
    gradients = []
    for dtype, where in ((torch.float32, backend), (torch.float64, "reference")):
        q, k, v, dy = (x.to(dtype) for x in inputs)
        leaves = [
            x.requires_grad_() for x in (q, k, torch.eye(16, dtype=dtype)[None].repeat(2, 1, 1))
        ]
        phi = lo.Features(leaves[2], activation=activation)
        y = lo.hybrid_attention(
            q, k, v, phi, phi, torch.zeros(2, dtype=dtype), window=16, backend=where
        )
        gradients.append(torch.autograd.grad(y, leaves, dy))
    for got, want in zip(*gradients, strict=True):
        # fp32's own rounding of what is so small; neighbours taken for ties made it 0.05 to 0.4.
        assert (got - want).norm() < 5e-3 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_a_token_alone_is_its_own_value_whatever_its_weight(backend, device):
    q = torch.zeros(1, 200, 1, 16, dtype=torch.bfloat16)
    v = torch.randn(1, 200, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    phi = lo.Features(torch.eye(16)[None].repeat(200, 1, 1))
    for window in (0, 4):
        gate = torch.linspace(-4, 4, 200)
        y = lo.hybrid_attention(q, q, v, phi, phi, gate, window=window, backend=backend)
        assert y.equal(v)


@pytest.mark.parametrize("backend", [*CPU, "reference"], indirect=True)
@pytest.mark.parametrize("window", [0, 4])
def test_large_gates_leave_both_parts_finite(backend, device, window):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3, 40, 16, generator=rng) for _ in range(3))
    phi = lo.Features(torch.randn(3, 16, 8, generator=rng))
    gate = torch.tensor([-200.0, 90.0, 200.0])
    y = lo.hybrid_attention(q, k, v, phi, phi, gate, window=window, affine=True, backend=backend)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", [*KERNELS, "reference"], indirect=True)
def test_the_linear_parts_factor_cancels_where_there_is_no_other(backend, device):
    """Features at their floor, times lambda, would be zero."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 20, 16, generator=rng).to(device)
    phi = lo.Features(torch.zeros(2, 16, 8, device=device), activation="relu")
    gate = torch.tensor([0.0, 60.0], device=device)
    attend = partial(lo.hybrid_attention, q, k, v, phi, phi, gate, window=0, backend=backend)
    y = attend(affine=True)
    assert y.isfinite().all()
    assert y.equal(attend())


@pytest.mark.parametrize("backend", [*CPU, "reference"], indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_infinite_does_not_look_finite(dtype, activation, backend, device):
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 100, 16, generator=rng).to(dtype)
    k[0, 0, 40, 3] = torch.inf
    phi = lo.Features(torch.randn(1, 16, 16, generator=rng), activation=activation)
    y = lo.hybrid_attention(q, k, v, phi, phi, torch.zeros(1), window=8, backend=backend)
    assert y[:, :, 48:].isnan().all()


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_sums_of_long_sequences_stay_exact(backend, device):
    """A term is added to those of its block first, not to all that came before."""
    q, k, v = torch.rand(3, 1, 1, 200_000, 8, generator=torch.Generator().manual_seed(0))
    _, state = lo.linear_attention(q, k, v, return_state=True, backend=backend)
    want = k.double().mT @ v.double()
    assert (state.kv - want).norm() < 3e-6 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("strides", [(0, 0, 0, 1), (0, 0, 3, 1), (19200, 16, 64, 1)])
def test_rows_may_lie_anywhere(backend, device, strides):
    """On top of each other, overlapping, or those of all heads of a token together."""
    H, T, D = 4, 300, 16
    memory = torch.randn(3, 2 * H * T * D, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.as_strided((2, H, T, D), strides) for x in memory)
    weight = torch.randn(H, D, 8, generator=torch.Generator().manual_seed(1))
    maps = [lo.Features(weight), lo.Features(weight.flip(1))]
    attend = partial(lo.hybrid_attention, gate=torch.zeros(H), window=20, backend=backend)
    apart = (x.contiguous() for x in (q, k, v))
    assert attend(q, k, v, *maps).equal(attend(*apart, *maps))


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("f", [5, 24, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_features_are_the_same_to_the_bit_whatever_tokens_it_is_among(
    backend, device, dtype, f
):
    rng = torch.Generator().manual_seed(f)
    x = torch.randn(1, 2, 37, 9, generator=rng).to(dtype)
    features = lo.Features(torch.randn(2, 9, f, generator=rng))
    together = lo.feature_map(x, features, backend=backend)
    alone = [lo.feature_map(token, features, backend=backend) for token in x.split(1, 2)]
    assert together.equal(torch.cat(alone, 2))


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "exp", "identity"])  # a factor, none, no clamp
@pytest.mark.parametrize("f", [24, 64])  # of which the first one does not fill vectors
def test_features_that_go_past_the_caches_equal_those_that_do_not(backend, device, f, activation):
    rng = torch.Generator().manual_seed(0)
    features = lo.Features(torch.randn(2, 8, f, generator=rng), activation=activation)
    x = torch.randn(1, 2, 2**24 // (8 * features.out_features) + 40, 8, generator=rng)
    large = lo.feature_map(x, features, backend=backend)
    assert large.nbytes > 2**24
    halves = [lo.feature_map(h, features, backend=backend) for h in x.split(x.shape[2] // 2, 2)]
    assert large.equal(torch.cat(halves, 2))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eps_counts_in_gradients(dtype, backend, device):
    case = Case("500", batch=(1, 2), activation="elu1", dtype=dtype)
    check(damped_linear_attention, case, backend, device)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", [{"window": 32}, {"window": 0}, {"window": 0, "sink": 4}])
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_the_gates_gradient_does_not_see_that_y_is_rounded(seed, settings, backend, device):
    check_gate(seed, (2, 4, 200, 64), backend, device, **settings)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize(
    ("call", "settings"),
    [*BOUNDLESS, (attention_transfer, {"window": 16, "sink": 2**40, "xent": True})],
)
def test_windows_sinks_and_gates_have_no_bounds(call, settings, backend, device):
    check(call, Case("500", batch=(1, 1), **settings), backend, device)
