"""Inputs that random cases hardly have: masks with holes, ties, floors that raise much, outputs
beyond the caches."""

from functools import partial

import pytest
import torch
from helpers.kernels import CPU
from helpers.operators import check_spread

import lolcats_ops as lo

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_of(op, leaves, dy, where, **options):
    q, k, v, wq, wk, gate = leaves
    maps = lo.Features(wq), lo.Features(wk)
    if op == "hybrid_attention":
        y = lo.hybrid_attention(q, k, v, *maps, gate, backend=where, **options)
        return y, *torch.autograd.grad(y, leaves, dy.to(y))
    if op == "linear_attention":
        options = {"key_padding_mask": options["key_padding_mask"], "eps": 0.1}
        y = lo.linear_attention(
            q, k, v, feature_q=maps[0], feature_k=maps[1], backend=where, **options
        )
        return y, *torch.autograd.grad(y, leaves[:5], dy.to(y))
    t = lo.attention_transfer(q, k, v, *maps, gate, xent=True, backend=where, **options)
    return t.teacher, *torch.autograd.grad(t.mse + t.xent, leaves[3:])


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("op", ["hybrid_attention", "linear_attention", "attention_transfer"])
def test_gradients_of_masks_with_holes_equal_the_reference(op, backend, device):
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 75, 16), (2, 2, 75, 16), (2, 2, 75, 12), (4, 16, 16), (4, 16, 16), (4,))
    inputs = [torch.randn(s, generator=rng) for s in shapes]
    dy = torch.randn(2, 4, 75, 12, generator=rng)
    real = torch.rand(2, 75, generator=rng) < 0.6
    options = {"window": 8, "sink": 1, "key_padding_mask": real}
    results = [
        gradients_of(op, [x.to(dtype).requires_grad_() for x in inputs], dy, where, **options)
        for dtype, where in ((torch.float32, backend), (torch.float64, "reference"))
    ]
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 2e-5 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("activation", ["softmax", "exp", "elu1"])
@pytest.mark.parametrize("sizes", [(64, 64), (64, 8), (16, 4)])
def test_maps_cancel_what_all_tokens_have_in_common(sizes, activation, backend, device):
    attention = partial(lo.hybrid_attention, backend=backend)
    options = {"activation": activation, "mean": 12.0, "gradients": False}
    check_spread(attention, 1.0, sizes, device, **options, window=0)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("window", [0, 16, 80])
def test_gradients_of_keys_that_have_much_in_common(window, backend, device):
    """Those of a query's scores add up to 0, but rounded to bf16 they do not."""
    check_spread(
        partial(lo.hybrid_attention, backend=backend),
        1.0,
        (64, 64),
        device,
        mean=12.0,
        window=window,
        sink=3 if window else 0,
    )


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("window", [16, 250])
def test_keys_that_come_again_share_the_gradient_of_the_maximum(window, backend, device):
    rng = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 300, 16),) * 3 + ((2, 16, 16), (2, 16, 16), (2,))
    inputs = [torch.randn(s, generator=rng) for s in shapes]
    inputs[1] = inputs[1][:, :, :100].repeat_interleave(3, 2)
    dy = torch.randn(1, 2, 300, 16, generator=rng)
    results = [
        gradients_of(
            "hybrid_attention",
            [x.to(dtype).requires_grad_() for x in inputs],
            dy,
            where,
            window=window,
        )
        for dtype, where in ((torch.float32, backend), (torch.float64, "reference"))
    ]
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 2e-5 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("two_sided", [True, False])
def test_the_largest_of_equal_features_share_their_gradient(two_sided, backend, device):
    """Columns of the weight that come again are equal for every token."""
    rng = torch.Generator().manual_seed(0)
    x, dy = torch.randn(1, 1, 40, 8, generator=rng), torch.randn(1, 1, 40, 24, generator=rng)
    w = torch.randn(1, 8, 4, generator=rng).repeat(1, 1, 3)

    def gradients(dtype, where):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        phi = lo.Features(leaves[1], None, "exp", two_sided)
        y = lo.feature_map(leaves[0], phi, backend=where)
        return torch.autograd.grad(y[..., : dy.shape[-1]], leaves, dy.to(dtype)[..., : y.shape[-1]])

    for got, want in zip(
        gradients(torch.float32, backend), gradients(torch.float64, "reference"), strict=True
    ):
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1e-2])
def test_gradients_are_exact_with_any_floor(eps, backend, device):
    rng = torch.Generator().manual_seed(0)
    x, dy = torch.randn(1, 2, 70, 16, generator=rng), torch.randn(1, 2, 70, 128, generator=rng)
    w = torch.randn(2, 16, 64, generator=rng)

    def gradients(dtype, where):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = lo.feature_map(leaves[0], lo.Features(leaves[1], eps=eps), backend=where)
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    for got, want in zip(
        gradients(torch.float32, backend), gradients(torch.float64, "reference"), strict=True
    ):
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_features_that_go_past_the_caches_keep_the_memory_order_of_x(backend, device):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2**24 // (16 * 64) + 40, 2, 8, generator=rng).transpose(1, 2)
    features = lo.Features(torch.randn(2, 8, 64, generator=rng))
    y = lo.feature_map(x, features, backend=backend)
    assert y.nbytes > 2**24
    assert y.equal(lo.feature_map(x.contiguous(), features, backend=backend))


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_cross_entropy_of_weights_near_and_below_the_floor(backend, device):
    """A closed gate with linear keys: the student's softmax weights go below 1e-12."""
    rng = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 70, 16),) * 3 + ((2, 16, 16), (2, 16, 16))
    inputs = [torch.randn(s, generator=rng) for s in shapes]
    inputs.append(torch.tensor([-24.0, -30.0]))

    def results(dtype, where):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        t = lo.attention_transfer(
            *leaves[:3],
            lo.Features(leaves[3]),
            lo.Features(leaves[4]),
            leaves[5],
            window=8,
            xent=True,
            backend=where,
        )
        return t.xent, *torch.autograd.grad(t.xent, leaves[3:])

    for got, want in zip(
        results(torch.float32, backend), results(torch.float64, "reference"), strict=True
    ):
        assert (got - want).norm() < 2e-4 * want.norm(), (got, want)
