"""The reference against the sums of SPEC in loops; its gradients against finite differences."""

import math
from functools import partial

import pytest
import torch
from helpers.cases import Case, Inputs, cases, make_inputs

import lolcats_ops as lo
from lolcats_ops.features import Features, init_weight
from lolcats_ops.state import HybridState

pytestmark = pytest.mark.usefixtures("one_thread")
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
SMALL = {"D": (3, 4), "V": ("D", 2), "f": ("D", 5), "window": (0, 1, 2, 3, 20)}
WINDOWS = ("window", "window_kind", "sink", "affine")
TINY = [
    Case(**{**vars(c), **size})
    for c in cases("G", "activation", "two_sided", "bias", "skip", "shared", *WINDOWS, **SMALL)
    for size in ({"length": "500", "batch": (1, 1), "dtype": torch.float64},)
    if c.G < 4
]


def tiny_inputs(case: Case, length: int = 7) -> Inputs:
    leaves = make_inputs(case).leaves
    cut = {n: x[:, :, :length] if n in ("q", "k", "v") else x for n, x in leaves.items()}
    return Inputs(case, cut, {})


def phi(x: list[float], features: Features, head: int, heads: int) -> list[float]:
    """SPEC 1, for one token of one head."""
    h = head // (heads // features.heads)
    D, f = features.head_dim, features.width
    z = [sum(x[d] * features.weight[h, d, i].item() for d in range(D)) for i in range(f)]
    if features.bias is not None:
        z = [z[i] + features.bias[h, i].item() for i in range(f)]
    if features.skip:
        z = [z[i] + x[i] for i in range(f)]

    def softmax(z: list[float]) -> list[float]:
        total = sum(map(math.exp, z))
        return [math.exp(y) / total for y in z]

    norm = sum(y * y for y in x)
    act = {
        "softmax": softmax,
        "exp": lambda z: [math.exp(y - max(z)) for y in z],
        "elu1": lambda z: [1 + (y if y > 0 else math.exp(y) - 1) for y in z],
        "relu": lambda z: [max(y, 0.0) for y in z],
        "identity": lambda z: z,
        "favor": lambda z: [math.exp(y - norm / 2) / math.sqrt(f) for y in z],
    }[features.activation]
    both = act(z) + (act([-y for y in z]) if features.two_sided else [])
    return both if features.activation == "identity" else [max(y, features.eps) for y in both]


def literal_rows(x: Inputs):
    """Per head and query of sequence 0: the weights of teacher and student over j <= i (SPEC 3)."""
    case = x.case
    q, k, _ = (t[0].tolist() for t in x.qkv)
    heads, group = len(q), len(q) // len(k)
    maps = x.features("q"), x.features("k")
    for h in range(heads):
        g = 1 / (1 + math.exp(-x.leaves["gate"][h].item()))
        lam = 1 - g if case.affine else 1.0
        keys = k[h // group]
        for i, query in enumerate(q[h]):
            w = case.window
            if case.window_kind == "sliding" or w == 0:
                start = max(0, i - w + 1)
            else:
                start = max(0, (i // w - 1) * w)
            s = [sum(map(math.prod, zip(query, key, strict=True))) for key in keys[: i + 1]]
            s = [y * case.D**-0.5 for y in s]
            inside = [j >= start or j < case.sink for j in range(i + 1)]
            m = max((y for y, near in zip(s, inside, strict=True) if near), default=0.0)
            phi_q = phi(query, maps[0], h, heads)
            a = []
            for j in range(i + 1):
                phi_k = phi(keys[j], maps[1], h, heads)
                linear = sum(map(math.prod, zip(phi_q, phi_k, strict=True)))
                a.append(g * math.exp(s[j] - m) if inside[j] else lam * linear)
            total = sum(map(math.exp, s))
            yield h, i, [math.exp(y) / total for y in s], [y / sum(a) for y in a]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_reference_equals_the_literal_sums(case):
    x = tiny_inputs(case)
    _, _, v = x.qkv
    group = case.G
    arguments = (*x.qkv, x.features("q"), x.features("k"), x.leaves["gate"])
    settings = {**case.windows, "affine": case.affine}
    out = lo.reference.hybrid_attention(*arguments, **settings)
    transfer = lo.reference.attention_transfer(*arguments, **settings, xent=True)
    errors, cross = [], []
    for h, i, teacher, student in literal_rows(x):
        values = v[0, h // group, : i + 1]
        y, target = (torch.tensor(a, dtype=values.dtype) @ values for a in (student, teacher))
        close(out[0, h, i], y)
        close(transfer.teacher[0, h, i], target)
        errors.append((y - target).square().mean())
        pairs = zip(teacher, student, strict=True)
        cross.append(-sum(t * math.log(max(a, 1e-12)) for t, a in pairs))
    close(transfer.mse, torch.stack(errors).mean())
    close(transfer.xent.item(), sum(cross) / len(cross))


@pytest.mark.parametrize("normalize", [True, False])
def test_linear_reference_equals_the_literal_sums(normalize):
    x = tiny_inputs(Case("500", D=3, V=2, f=5, G=2, batch=(1, 2), shared="k"))
    q, k, v = x.qkv
    settings = {"feature_q": x.features("q"), "feature_k": x.features("k")}
    kv0 = torch.rand(1, 2, 10, 2, dtype=torch.float64)
    ksum0 = torch.rand(1, 2, 10, dtype=torch.float64)
    length = torch.tensor([3])
    initial = HybridState.of_sums(kv0, ksum0, length, head_dim=3, kv_heads=2)
    out, final = lo.reference.linear_attention(
        q,
        k,
        v,
        **settings,
        scale=0.3,
        eps=0.1,
        normalize=normalize,
        state=initial,
        return_state=True,
    )
    phi_q = lo.reference.feature_map(q, x.features("q"))
    phi_k = lo.reference.feature_map(k, x.features("k"))
    for h in range(4):
        kv, ksum = kv0[0, h // 2].clone(), ksum0[0, h // 2].clone()
        for i in range(7):
            kv += torch.outer(phi_k[0, h // 2, i], v[0, h // 2, i])
            ksum += phi_k[0, h // 2, i]
            num, den = 0.3 * phi_q[0, h, i] @ kv, 0.3 * phi_q[0, h, i] @ ksum + 0.1
            close(out[0, h, i], num / den if normalize else num)
        close(final.kv[0, h // 2], kv)
        close(final.ksum[0, h // 2], ksum)
    assert final.length.tolist() == [10]


def gradcheck(f, x: Inputs) -> None:
    leaves = {n: t.clone().requires_grad_() for n, t in x.leaves.items()}

    def call(*tensors: torch.Tensor):
        return f(Inputs(x.case, dict(zip(leaves, tensors, strict=True)), {}))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("activation", ["softmax", "exp", "elu1", "relu", "identity", "favor"])
def test_gradcheck_of_the_reference(activation):
    case = Case(
        "500", D=3, V=2, G=2, batch=(1, 1), window=2, sink=1, activation=activation, affine=True
    )
    settings = {**case.windows, "affine": True}
    x = tiny_inputs(case, length=5)

    def maps(x):
        return x.features("q"), x.features("k")

    gradcheck(lambda x: lo.reference.feature_map(x.leaves["q"], x.features("q")), x)
    gradcheck(
        lambda x: lo.reference.hybrid_attention(*x.qkv, *maps(x), x.leaves["gate"], **settings), x
    )

    def linear(x):
        q, k = maps(x)
        y, s = lo.reference.linear_attention(*x.qkv, feature_q=q, feature_k=k, return_state=True)
        return y, s.kv, s.ksum

    gradcheck(linear, x)
    parameters = {n: t for n, t in x.leaves.items() if n not in ("q", "k", "v")}

    def transfer(p):
        p.leaves.update(zip("qkv", x.qkv, strict=True))
        t = lo.reference.attention_transfer(
            *p.qkv, *maps(p), p.leaves["gate"], **settings, xent=True
        )
        return t.mse, t.xent

    gradcheck(transfer, Inputs(case, parameters, {}))


def test_window_and_features_partition_the_keys():
    # w >= T is softmax attention; w = 0 linear attention.
    x = tiny_inputs(Case("500", D=4, G=2, batch=(2, 2)))
    q, k, v = x.qkv
    arguments = (q, k, v, x.features("q"), x.features("k"), x.leaves["gate"])
    for kind in ("sliding", "terrace"):
        softmax = lo.reference.hybrid_attention(*arguments, window=7, window_kind=kind)
        close(
            softmax,
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            ),
        )
        linear = lo.reference.hybrid_attention(*arguments, window=0, window_kind=kind)
        close(
            linear,
            lo.reference.linear_attention(
                q, k, v, feature_q=arguments[3], feature_k=arguments[4], eps=0.0
            ),
        )


def test_initialisers_and_widths():
    eye = init_weight(2, 4, 6)
    assert torch.equal(eye[1], torch.eye(4, 6))
    assert not init_weight(1, 3, 3, "zero").any()
    bound = math.sqrt(6 / (16 * 32))
    kaiming = init_weight(4, 16, 32, "kaiming")
    assert 0.9 * bound < kaiming.abs().max() <= bound
    assert abs(init_weight(8, 64, 64, "normal").std() - 1 / 8) < 0.01
    rows = torch.nn.functional.normalize(init_weight(1, 16, 16, "orthogonal")[0], dim=0)
    torch.testing.assert_close(rows.T @ rows, torch.eye(16), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="init is 'ones', needs one of identity"):
        init_weight(1, 2, 2, "ones")
    assert Features(eye).out_features == 12
    assert Features(eye, activation="relu").out_features == 6
    assert not Features(eye, activation="relu").two_sided


@pytest.mark.parametrize("bounds", [[0], [0, 3, 7]])
def test_tokens_past_the_last_sequence_are_zero(bounds):
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    phi = lo.Features(torch.eye(8)[None].repeat(2, 1, 1))
    rest = (phi, phi, torch.zeros(2))
    packed = {"cu_seqlens": torch.tensor(bounds), "backend": "reference"}
    y, state = lo.hybrid_attention(q, k, v, *rest, window=2, return_state=True, **packed)
    torch.testing.assert_close(y, lo.hybrid_attention(q, k, v, *rest, window=2, **packed))
    assert state.batch == len(bounds) - 1
