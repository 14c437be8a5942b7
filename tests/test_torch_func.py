"""The operators within transforms of torch.func, compiled and not."""

import pytest

pytest.importorskip("torch")
import torch
from torch.func import grad, jacfwd, jvp, vjp, vmap

import lolcats_ops as lo

Q = torch.linspace(-2, 2, 4 * 20 * 16).sin().view(1, 4, 20, 16)
K, V = Q[:, ::2].cos(), Q[:, ::2].flip(2)
WEIGHT = torch.linspace(0, 9, 4 * 16 * 16).cos().view(4, 16, 16) / 3
GATE = torch.zeros(4)

LOSSES = {
    "feature_map": lambda w: lo.feature_map(Q, lo.Features(w)).square().sum(),
    "linear_attention": lambda w: (
        lo.linear_attention(Q, K, V, feature_q=lo.Features(w), feature_k=lo.Features(w))
        .square()
        .sum()
    ),
    "hybrid_attention": lambda w: (
        lo.hybrid_attention(Q, K, V, lo.Features(w), lo.Features(w), GATE, window=8).square().sum()
    ),
    "attention_transfer": lambda w: (
        lo.attention_transfer(Q, K, V, lo.Features(w), lo.Features(w), GATE, window=8).mse
    ),
}
of_operators = pytest.mark.parametrize("op", LOSSES)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


@of_operators
@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap of grad"])
def test_a_compiled_transform_gives_what_it_gives_eagerly(op, transform):
    loss = LOSSES[op]
    weight = torch.stack((WEIGHT, WEIGHT / 2)) if transform == "vmap of grad" else WEIGHT
    call = {
        "grad": grad(loss),
        "vjp": lambda w: vjp(loss, w)[1](torch.ones(()))[0],
        "vmap of grad": vmap(grad(loss)),
    }[transform]
    want = call(weight)
    assert want.any()
    assert torch.equal(torch.compile(call)(weight), want)


def test_vmap_compiles_as_one_graph():
    call = vmap(lambda q: lo.feature_map(q, lo.Features(WEIGHT)))
    several = torch.stack((Q, Q / 2))
    assert torch.equal(torch.compile(call, fullgraph=True)(several), call(several))


@of_operators
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_forward_mode_derivatives_are_refused_and_never_zero(op, compile, transform):
    loss = LOSSES[op]
    call = {"jvp": lambda w: jvp(loss, (w,), (torch.ones_like(w),))[1], "jacfwd": jacfwd(loss)}
    derivative = torch.compile(call[transform]) if compile else call[transform]
    with pytest.raises(NotImplementedError, match=f"{op}: .* no forward-mode derivative; backend="):
        derivative(WEIGHT)
