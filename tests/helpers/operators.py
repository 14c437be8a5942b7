"""Every operator on a case of the matrix, forward and backward, against the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType, SimpleNamespace

import torch

import lolcats_ops as lo
from lolcats_ops.state import HybridState

from .cases import Case, Inputs, cases, exact, make_inputs
from .compare import assert_close

MAPS = ("D", "f", "G", "batch", "two_sided", "bias", "skip", "shared", "layout", "dtype")
SEQUENCES = ("length", "V", "window", "packing")
HYBRID = (*MAPS, *SEQUENCES, "window_kind", "sink", "affine", "activation")

# Of a matrix of all lengths and windows most cases have no keys beyond the window. These do.
LINEAR_KEYS = cases(
    *("activation", "two_sided", "shared", "affine", "window_kind", "G", "xent", "dtype"),
    length=("3w+7",),
    window=(1, 16),
)


def feature_map(ops: ModuleType, x: Inputs, **options: str) -> dict[str, torch.Tensor]:
    return {"y": ops.feature_map(x.leaves["q"], x.features("q"), **options)}


def linear_attention(
    ops: ModuleType, x: Inputs, eps: float = 1e-6, **options: str
) -> dict[str, torch.Tensor]:
    state = None
    if x.case.initial:
        kv, ksum = x.leaves["kv0"], x.leaves["ksum0"]
        length = torch.ones(kv.shape[0], dtype=torch.int64, device=kv.device)
        sizes = {"head_dim": x.case.D, "kv_heads": x.leaves["k"].shape[1]}
        state = HybridState.of_sums(kv, ksum, length, **sizes)
    maps = {"feature_q": x.features("q"), "feature_k": x.features("k")}
    # Without the denominator, results grow with T: keep them within fp16.
    scale = 0.5 if x.case.normalize else 0.5 / (1 + x.case.T)
    settings = {"scale": scale, "normalize": x.case.normalize, "eps": eps, **maps, **x.sequences}
    out, state = ops.linear_attention(*x.qkv, **settings, state=state, return_state=True, **options)
    return {"out": out, "kv": state.kv, "ksum": state.ksum}


def damped_linear_attention(ops: ModuleType, x: Inputs, **options: str) -> dict[str, torch.Tensor]:
    """linear_attention with an eps of a good part of the weights' sum, for features of about 1."""
    return linear_attention(ops, x, eps=0.25 * x.case.D * x.case.T, **options)


def hybrid_attention(
    ops: ModuleType, x: Inputs, gate: float = 0.0, **options: str
) -> dict[str, torch.Tensor]:
    settings = {**x.case.windows, "affine": x.case.affine, **x.sequences}
    arguments = (*x.qkv, x.features("q"), x.features("k"), x.leaves["gate"] + gate)
    return {"out": ops.hybrid_attention(*arguments, **settings, **options)}


def closed_gates(ops: ModuleType, x: Inputs, **options: str) -> dict[str, torch.Tensor]:
    """hybrid_attention with gates whose sigmoids fp32 cannot hold, and with large gradients."""
    return {"out": 1e4 * hybrid_attention(ops, x, gate=-120.0, **options)["out"]}


# Windows and sinks of more tokens than there are, and than fit any integer's multiples.
BOUNDLESS = (
    (hybrid_attention, {"window": 2**31 - 1}),
    (hybrid_attention, {"window": 2**62 + 1600, "window_kind": "terrace"}),
    (hybrid_attention, {"window": 16, "sink": 2**63 - 1}),
    (closed_gates, {"window": 2**63 - 1}),
)


def attention_transfer(ops: ModuleType, x: Inputs, **options: str) -> dict[str, torch.Tensor]:
    settings = {**x.case.windows, "affine": x.case.affine, "xent": x.case.xent, **x.sequences}
    arguments = (*x.qkv, x.features("q"), x.features("k"), x.leaves["gate"])
    return ops.attention_transfer(*arguments, **settings, **options)._asdict()


def evaluate(call, ops, inputs: Inputs, **options: str) -> SimpleNamespace:
    """Outputs by name, and gradients of all leaves that the outputs depend on, as ``d<leaf>``."""
    outputs = call(ops, inputs, **options)
    rng = torch.Generator().manual_seed(1)
    cotangents = {n: exact(torch.randn(y.shape, generator=rng)) for n, y in outputs.items()}
    pairs = [(y, cotangents[n].to(y)) for n, y in outputs.items() if y.requires_grad]
    leaves = inputs.leaves
    gradients = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [d for _, d in pairs], allow_unused=True
    )
    named = {f"d{n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    size = max(d.norm().item() for _, d in pairs)
    return SimpleNamespace(outputs=outputs, gradients=named, cotangent=size)


@lru_cache(maxsize=2)
def expected(call, case: Case) -> SimpleNamespace:
    inputs = make_inputs(case).as_dtype(torch.float64, "plain")
    return evaluate(call, lo.reference, inputs)


def check(
    call,
    case: Case,
    backend: str,
    device: str = "cpu",
    *,
    floor: float = 0.03,
    factor: float = 2,
) -> None:
    """The operator on ``backend`` against the reference. ``factor``: what gradients may err by, of
    the outputs' tolerance. ``floor``: errors of those that vanish are measured against this share
    of the size of the cotangents that come in."""
    want = expected(call, case)
    inputs = make_inputs(case).as_dtype(case.dtype, case.layout, device)
    got = evaluate(call, lo, inputs, backend=backend)
    for name, y in want.outputs.items():
        assert_close(name, got.outputs[name], y, case.dtype, floor=1e-3)
    assert got.gradients.keys() == want.gradients.keys()
    for name, g in want.gradients.items():
        assert got.gradients[name].dtype == inputs.leaves[name[1:]].dtype
        size = floor * want.cotangent
        assert_close(name, got.gradients[name], g, case.dtype, factor=factor, floor=size)


def check_transfer(case: Case, backend: str, device: str = "cpu") -> None:
    """check() of attention_transfer.

    Where a feature of ``relu`` is almost 0, what its z is off by is a relative error of the weight,
    and so of the gradient of its logarithm: in fp32 beyond what is allowed (precision.md).
    """
    beyond = case.xent and case.activation == "relu" and case.dtype is torch.float32
    check(attention_transfer, case, backend, device, factor=4 if beyond else 2)


def check_gate(
    seed: int,
    shape: tuple[int, int, int, int],
    backend: str,
    device: str,
    **settings: int,
) -> None:
    """The gate's gradient alone, of ``shape`` B, H, T, D in bf16, without a floor.

    It is a sum over all queries, in which roundings of y would show.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, heads, length, head_dim = shape

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=rng)

    q, dy = normal(*shape), normal(*shape)
    k, v = normal(2, batch, heads // 2, length, head_dim)
    maps = torch.eye(head_dim) + 0.1 * normal(2, heads, head_dim, head_dim)
    gate = normal(heads)

    def gradient(ops: ModuleType, dtype: torch.dtype, **options: str) -> torch.Tensor:
        parameters = torch.promote_types(dtype, torch.float32)
        leaf = gate.to(device, parameters).requires_grad_()
        rows = [x.to(device, torch.bfloat16).to(dtype) for x in (q, k, v, dy)]
        features = [lo.Features(weight.to(device, parameters)) for weight in maps]
        y = ops.hybrid_attention(*rows[:3], *features, leaf, **settings, **options)
        return torch.autograd.grad(y, leaf, rows[3])[0]

    want = gradient(lo.reference, torch.float64)
    got = gradient(lo, torch.bfloat16, backend=backend)
    assert_close("dgate", got, want, torch.bfloat16, factor=2)


def check_spread(
    attention: Callable[..., torch.Tensor],
    spread: float,
    sizes: tuple[int, int],
    device: str = "cpu",
    *,
    activation: str = "softmax",
    mean: float = 0.0,
    gradients: bool = True,
    **settings: int,
) -> None:
    """``attention``, a hybrid_attention, in bf16 with z of N(0, spread^2), ``sizes`` D and f.

    What z is off by is a relative error of its exponential: bf16 does not hold weights well enough.
    Queries and keys may have a ``mean`` in each channel, which the maps cancel.
    """
    rng = torch.Generator().manual_seed(0)
    D, f = sizes
    rows = torch.randn(4, 1, 2, 200, D, generator=rng)
    rows[:2] += mean
    rows = rows.bfloat16()
    maps = torch.randn(2, 2, D, f, generator=rng) * spread * D**-0.5
    if mean:
        maps -= maps.mean(-2, keepdim=True)
    gate = torch.zeros(2)

    def run(attention: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        parameters = torch.promote_types(dtype, torch.float32)
        q, k, v, dy = (x.to(device, dtype) for x in rows)
        leaves = [q, k, v, *(x.to(device, parameters) for x in maps)]
        leaves = [x.requires_grad_(gradients) for x in leaves]
        features = (lo.Features(x, activation=activation) for x in leaves[3:])
        y = attention(*leaves[:3], *features, gate.to(device, parameters), **settings)
        return [y, *torch.autograd.grad(y, leaves, dy)] if gradients else [y]

    names = ["y", "dq", "dk", "dv", "dweight_q", "dweight_k"] if gradients else ["y"]
    got = run(attention, torch.bfloat16)
    want = run(lo.reference.hybrid_attention, torch.float64)
    for name, y, expected_y in zip(names, got, want, strict=True):
        assert_close(name, y, expected_y, torch.bfloat16, factor=1 if name == "y" else 2)
