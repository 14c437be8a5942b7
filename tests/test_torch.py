"""The operators inside torch: opcheck, compile, export, AOTInductor, torch.func, autocast."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers.cases import Case, lay_out, make_inputs
from helpers.kernels import INTERPRETED
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

import lolcats_ops as lo
from lolcats_ops.features import Features
from lolcats_ops.ops.registration import operators
from lolcats_ops.state import HybridState

pytestmark = pytest.mark.usefixtures("one_thread")
raw = torch.ops.lolcats_ops
WINDOW = {"window": 4, "sink": 1}
SETTINGS = (4, 0, 1, 0.25, False)  # window, sliding, sink, scale, affine
ACTIVATION = (0, True, False, 1e-12)
SIZES = {"heads": 2, "kv_heads": 2, "head_dim": 16, "value_dim": 20, "feature_dim": 16}


class Example(NamedTuple):
    """One input of every operator: B=2, H=4, Hk=2, T=12, D=16, V=20, f=8."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight_q: Tensor
    weight_k: Tensor
    gate: Tensor


def example(dtype: torch.dtype = torch.float32) -> Example:
    case = Case("3w+7", D=16, V=20, f=8, G=2, batch=(2, 2), window=2, shared="k")
    x = make_inputs(case).as_dtype(dtype, "transposed").leaves
    return Example(*(x[n].detach().clone() for n in Example._fields))


def shorten(x: Example) -> Example:
    """The first 7 tokens, in the memory order of ``example``."""
    first = {n: lay_out(getattr(x, n)[:, :, :7], "transposed") for n in "qkv"}
    return x._replace(**first)


def feature_map(x: Example, **options) -> Tensor:
    return lo.feature_map(x.q, Features(x.weight_q), **options)


def linear_attention(x: Example, **options) -> tuple[Tensor, ...]:
    maps = {"feature_q": Features(x.weight_q), "feature_k": Features(x.weight_k)}
    out, state = lo.linear_attention(*x[:3], **maps, return_state=True, **options)
    return out, state.kv, state.ksum


def hybrid_attention(x: Example, **options) -> Tensor:
    maps = Features(x.weight_q), Features(x.weight_k)
    return lo.hybrid_attention(*x[:3], *maps, x.gate, **WINDOW, **options)


def attention_transfer(x: Example, **options) -> tuple[Tensor, ...]:
    maps = Features(x.weight_q), Features(x.weight_k)
    return tuple(lo.attention_transfer(*x[:3], *maps, x.gate, **WINDOW, xent=True, **options))


def hybrid_attention_step_(x: Example, **options) -> tuple[Tensor, ...]:
    maps = Features(x.weight_q), Features(x.weight_k)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.q.dtype
    state = HybridState.empty(x.q.shape[0], **SIZES, **WINDOW, dtype=dtype, device=x.q.device)
    with torch.no_grad():
        out = lo.hybrid_attention_step_(*x[:3], *maps, x.gate, state, **options)
    return out, state.kv, state.k_ring, state.length


DIFFERENTIABLE = [feature_map, linear_attention, hybrid_attention, attention_transfer]
ALL = [*DIFFERENTIABLE, hybrid_attention_step_]
of_all = pytest.mark.parametrize("op", ALL, ids=lambda op: op.__name__)
of_differentiable = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.__name__)


def loss_of(op: Callable, **options) -> Callable[..., Tensor]:
    """A scalar with uneven cotangents of everything that op returns and that is differentiable."""

    def loss(*tensors: Tensor) -> Tensor:
        outputs = op(Example(*tensors), **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if op is attention_transfer:
            outputs = outputs[1:]
        return sum(
            (y.float() * torch.linspace(0.5, 1, y.numel()).view(y.shape)).sum() for y in outputs
        )

    return loss


def learned(op: Callable) -> tuple[int, ...]:
    """Positions in Example of what op has gradients of."""
    return {
        feature_map: (0, 3),
        linear_attention: (0, 1, 2, 3, 4),
        attention_transfer: (3, 4, 5),
    }.get(op, (0, 1, 2, 3, 4, 5))


def with_grad(op: Callable, x: Example) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_(i in learned(op)) for i, t in enumerate(x))


def gradients(loss: Callable, op: Callable, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*tensors), [tensors[i] for i in learned(op)])


def close(got, want) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def raw_calls() -> dict[str, tuple]:
    """Arguments of every operator in the shim."""
    x = example()
    maps = (x.weight_q, None, x.weight_k, None)
    parameters = (*maps, x.gate)
    state = HybridState.empty(2, **SIZES, **WINDOW)
    mask = torch.ones(2, x.q.shape[2], dtype=torch.bool)
    linear = (*x[:3], *maps, state.kv + 1, state.ksum + 1, None, mask)
    hybrid = (*x[:3], *parameters, None, mask)
    weight, bias = x.weight_q, torch.zeros(4, 8)
    calls = {
        "feature_map": (x.q, weight, bias, *ACTIVATION),
        "linear_attention": (*linear, 1.0, True, 1e-12, *ACTIVATION),
        "hybrid_attention": (*hybrid, *SETTINGS, *ACTIVATION),
        "attention_transfer": (*hybrid, True, *SETTINGS, *ACTIVATION),
        "hybrid_attention_step_": (
            *(*x[:3], *parameters, *state.tensors.values()),
            *(None, None, mask, 4, 0, 0.25, False, *ACTIVATION),
        ),
    }
    y = raw.feature_map(*calls["feature_map"])
    calls["feature_map_backward"] = (y, *calls["feature_map"])
    out, den, kv, ksum = raw.linear_attention(*calls["linear_attention"])
    rest = (out, den, *calls["linear_attention"][11:])
    calls["linear_attention_backward"] = (out, kv, ksum, *linear, *rest)
    saved = raw.hybrid_attention(*calls["hybrid_attention"])
    rest = (*saved, *calls["hybrid_attention"][10:])
    calls["hybrid_attention_backward"] = (saved[0], *hybrid, *rest)
    _, mse, xent, *saved = raw.attention_transfer(*calls["attention_transfer"])
    rest = (*saved, *calls["attention_transfer"][10:])
    calls["attention_transfer_backward"] = (mse, xent, *hybrid, *rest)
    return calls


@pytest.mark.parametrize("backend", ["cpu", *INTERPRETED])
@pytest.mark.parametrize("name", raw_calls())
def test_opcheck(name, backend):
    arguments = list(raw_calls()[name])
    if name in {op.__name__ for op in DIFFERENTIABLE}:
        for i, a in enumerate(arguments):
            if isinstance(a, Tensor) and a.is_floating_point():
                arguments[i] = a.requires_grad_()
    torch.library.opcheck(getattr(operators(backend), name).default, tuple(arguments))


def test_padded_queries_have_no_output_a_maximum_of_0_and_a_denominator_of_1():
    arguments = list(raw_calls()["hybrid_attention"])
    real = arguments[9] = torch.rand(arguments[9].shape) < 0.6
    out, m, den = raw.hybrid_attention(*arguments)
    for got, at_padding in ((out.transpose(1, 2), 0.0), (m.mT, 0.0), (den.mT, 1.0)):
        assert (got[~real] == at_padding).all()
        assert (got[real] != at_padding).all()


@of_all
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(op, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = example()
    close(compiled(x), op(x))
    if dynamic:
        shorter = shorten(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            close(compiled(shorter), op(shorter))


@of_differentiable
def test_compiled_gradients_equal_eager_ones(op):
    torch._dynamo.reset()
    loss = loss_of(op)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = with_grad(op, example())
    close(gradients(compiled, op, tensors), gradients(loss, op, tensors))


class Everything(torch.nn.Module):
    """All operators, one after the other; a state in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.state = HybridState.empty(2, **SIZES, **WINDOW)
        for name, x in self.state.tensors.items():
            self.register_buffer(name, x)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x = Example(*tensors)
        state = HybridState(**{n: getattr(self, n) for n in self.state.tensors}, window=4)
        maps = Features(x.weight_q), Features(x.weight_k)
        step = lo.hybrid_attention_step_(*x[:3], *maps, x.gate, state)
        others = (feature_map(x), *linear_attention(x), hybrid_attention(x), *attention_transfer(x))
        return step, *others


def test_inductor_export_and_aotinductor(tmp_path):
    tensors = tuple(example())
    length = torch.export.Dim("length", min=2, max=4096)
    rows = {2: length}
    with torch.no_grad():
        want = Everything()(*tensors)
        torch._dynamo.reset()
        close(torch.compile(Everything(), fullgraph=True)(*tensors), want)
        program = torch.export.export(
            Everything(), tensors, dynamic_shapes=((rows, rows, rows, None, None, None),)
        )
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "ops.pt2")
        )
        run = torch._inductor.aoti_load_package(package)
        close(tuple(run(*tensors)), want)
        shorter = shorten(Example(*tensors))
        run = torch._inductor.aoti_load_package(package)
        close(tuple(run(*shorter)), Everything()(*shorter))
        close(program.module()(*tensors), want)  # last: it steps the program's own state


@of_differentiable
def test_func_grad_equals_autograd_of_the_reference(op):
    x = example()
    got = grad(loss_of(op), learned(op))(*x)
    wide = with_grad(op, Example(*(t.double() for t in x)))
    want = gradients(loss_of(op, backend="reference"), op, wide)
    close([g.double() for g in got], list(want))


@of_differentiable
def test_direct_calls_are_differentiable(op):
    arguments = raw_calls()[op.__name__]
    tensors = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    outputs = getattr(raw, op.__name__)(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(y.float().square().sum() for y in outputs if y.requires_grad)
    wanted = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    twice = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    with pytest.raises(NotImplementedError, match="no second-order gradients"):
        sum(g.square().sum() for g in twice if g is not None).backward(retain_graph=True)
    loss.backward()
    first = 3 if op is attention_transfer else 0
    leaves = [t for t in tensors[first:] if isinstance(t, Tensor) and t.is_leaf and t.requires_grad]
    assert leaves
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)


@of_differentiable
def test_second_gradients_are_refused_and_never_left_out(op):
    wanted = learned(op)
    x = with_grad(op, example())
    loss = loss_of(op)(*x)
    (first,) = torch.autograd.grad(loss, x[wanted[0]], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second-order gradients"):
        (loss + first.square().sum()).backward()
    of_loss = grad(loss_of(op), wanted[0])
    with pytest.raises(NotImplementedError, match="no second-order gradients"):
        grad(lambda *tensors: of_loss(*tensors).square().sum(), wanted[0])(*example())


def stacked(x: Example, rows: bool) -> list[Tensor]:
    """Three variations of the activations (or of the parameters) of x; the rest as it is."""
    rng = torch.Generator().manual_seed(0)
    return [
        t + 0.1 * torch.randn(3, *t.shape, generator=rng) if (i < 3) == rows else t
        for i, t in enumerate(x)
    ]


@of_differentiable
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "parameters"])
def test_vmap_equals_a_loop(op, rows):
    tensors = stacked(example(), rows)
    dims = tuple(0 if (i < 3) == rows else None for i in range(6))

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = op(Example(*tensors))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    got = vmap(one, dims)(*tensors)
    for i in range(3):
        want = one(*(t if d is None else t[i] for t, d in zip(tensors, dims, strict=True)))
        close(tuple(g[i] for g in got), want)


@of_differentiable
def test_vmap_of_grad_gives_gradients_per_sample(op):
    tensors = stacked(example(), rows=True)
    f = grad(loss_of(op), learned(op))
    got = vmap(f, (0, 0, 0, None, None, None))(*tensors)
    for i in range(3):
        want = f(*(t[i] for t in tensors[:3]), *tensors[3:])
        close(tuple(g[i] for g in got), want)


def test_vmap_of_steps_needs_and_updates_a_state_for_each():
    tensors = stacked(example(), rows=True)
    x = example()
    maps = Features(x.weight_q), Features(x.weight_k)
    states = [HybridState.empty(2, **SIZES, **WINDOW) for _ in range(3)]
    pools = [torch.stack(t) for t in zip(*(s.tensors.values() for s in states), strict=True)]

    def step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> Tensor:
        return lo.hybrid_attention_step_(q, k, v, *maps, x.gate, HybridState(*state, window=4))

    got = vmap(step)(*tensors[:3], *pools)
    for i, state in enumerate(states):
        rows = (t[i] for t in tensors[:3])
        close(got[i], lo.hybrid_attention_step_(*rows, *maps, x.gate, state))
        close([pool[i] for pool in pools], list(state.tensors.values()))
    with pytest.raises(ValueError, match="vmap needs kv, which is written, to be mapped as well"):
        vmap(step, (0, 0, 0, *[None] * 8))(*tensors[:3], *states[0].tensors.values())
    pools[-1][2] = 99  # folded, of the last sample
    before = [pool.clone() for pool in pools]
    with pytest.raises(ValueError, match="folded"):
        vmap(step)(*tensors[:3], *pools)
    assert all(map(torch.equal, pools, before))


@pytest.mark.parametrize("module", [lo.nn.HybridAttention, lo.nn.LinearAttention])
def test_modules_compile_for_any_shape(module):
    attention = module(4, 2, 16)
    compiled = torch.compile(attention, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (9, 20):
        q, k, v = (torch.randn(2, heads, length, 16) for heads in (4, 2, 2))
        close(compiled(q, k, v), attention(q, k, v))


@of_differentiable
def test_compiled_autograd_gives_the_same_gradients(op):
    loss, tensors = loss_of(op), with_grad(op, example())
    want = gradients(loss, op, tensors)
    eager = loss(*tensors)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        eager.backward()
    close(tuple(tensors[i].grad for i in learned(op)), want)


class Unused(torch.autograd.Function):
    """What has no gradient for its input."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.sum()

    @staticmethod
    def backward(ctx, d: Tensor) -> None:
        return None


@of_differentiable
def test_an_output_without_a_gradient_gives_none_or_zero(op):
    tensors = with_grad(op, example())
    y = op(Example(*tensors))
    y = y[op is attention_transfer] if isinstance(y, tuple) else y
    Unused.apply(y).backward()
    assert all(t.grad is None or not t.grad.any() for t in tensors)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_parameters_of_modules_are_fp32(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        attention = lo.nn.HybridAttention(4, 2, 16, bias=True)
    finally:
        torch.set_default_dtype(before)
    for module in (attention, attention.to(torch.bfloat16), attention.half()):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert attention.double().gate.dtype == torch.float64


@of_differentiable
def test_autocast_leaves_fp64_and_the_reference_as_they_are(op):
    x = example()
    wide = Example(*(t.double() for t in x))
    want = op(wide, backend="reference"), lo.reference.feature_map(x.q, Features(x.weight_q))
    with torch.autocast("cpu", torch.bfloat16):
        got = op(wide, backend="reference"), lo.reference.feature_map(x.q, Features(x.weight_q))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@of_all
def test_autocast_runs_activations_in_its_dtype(op):
    x = example()
    tensors = with_grad(op, x)
    half = Example(*(t.bfloat16() if i < 3 else t for i, t in enumerate(x)))
    with torch.autocast("cpu", torch.bfloat16):
        close(op(x), op(half))
        if op is not hybrid_attention_step_:
            loss = loss_of(op)(*tensors)
    if op is hybrid_attention_step_:
        return
    loss.backward()
    for i in learned(op):
        assert tensors[i].grad.dtype == torch.float32


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.__name__)
def test_autocast_reaches_direct_calls(op):
    arguments = raw_calls()[op.__name__]
    with torch.autocast("cpu", torch.float16):
        outputs = getattr(raw, op.__name__)(*arguments)
    first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    assert first.dtype == torch.float16
    assert all(y.dtype == torch.float32 for y in others)


@of_all
@pytest.mark.parametrize("backend", [None, "cuda", "triton"])
def test_fake_cuda_tensors_need_no_gpu(op, backend):
    real = op(example())
    with FakeTensorMode():
        x = Example(*(torch.empty_strided(t.shape, t.stride(), device="cuda") for t in example()))
        fake = op(x, backend=backend)
    pair = (fake, real) if isinstance(fake, tuple) else ((fake,), (real,))
    for f, r in zip(*pair, strict=True):
        assert f.device.type == "cuda"
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@of_all
def test_results_keep_the_memory_order_of_q(op):
    def first(x: Example) -> Tensor:
        y = op(x)
        return y[0] if isinstance(y, tuple) else y

    x = example()
    assert first(x).transpose(1, 2).is_contiguous()
    plain = Example(*(t.contiguous() for t in x))
    assert first(plain).is_contiguous()
