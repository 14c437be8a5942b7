"""The interpreter computes what a GPU would, judged by torch on the CPU."""

import pytest
import torch

from gpu_on_cpu import interpreter, sanitizer

from . import example_kernels as kernels

interpreter.install()

N = 1024
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def numbers(rng, dtype, *shape):
    """Of many magnitudes, so that roundings, ties and signs all occur."""
    scale = torch.randint(-8, 8, shape, generator=rng).float().exp2()
    return (torch.randn(shape, generator=rng) * scale).to(dtype)


EXPECTED = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "lt": torch.lt,
    "eq": torch.eq,
    "where": lambda x, y: torch.where(x > y, x, -y),
    "fma": lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype),
    "abs": lambda x, y: x.abs(),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "clamp with nan": lambda x, y: x.clamp(-0.5, 0.5),
    "atomic": lambda x, y: y.clone(),
}


@pytest.mark.parametrize("op", EXPECTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elementwise_results_equal_torch_bit_for_bit(op, dtype, rng):
    x, y = numbers(rng, dtype, N), numbers(rng, dtype, N)
    y[:64] = x[:64]
    expected = EXPECTED[op](x, y)
    o = torch.empty_like(expected)
    kernels.binary[(1,)](x, y, o, op, N)
    torch.testing.assert_close(o, expected, rtol=0, atol=0)


def test_a_bf16_atomic_add_adds_in_bf16(rng):
    x, y = numbers(rng, torch.bfloat16, N), numbers(rng, torch.bfloat16, N)
    expected = x + y
    kernels.binary[(1,)](x, y, torch.empty_like(x), "atomic", N)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("source", [*DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("target", [*DTYPES, torch.int32], ids=str)
def test_casts_round_like_torch(source, target, rng):
    x = numbers(rng, torch.float64, N).mul(100).to(source)
    o = torch.empty(N, dtype=target)
    kernels.cast[(1,)](x, o, N)
    assert torch.equal(o, x.to(target))


def test_a_cast_to_bf16_ties_to_even_and_keeps_infinities_and_nans():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, INF, -INF, NAN, 1e-40, -0.0])
    x.view(torch.int32)[5] = 0x7FFFFFFF  # a NaN that rounding the bits would carry into the sign
    o = torch.empty(8, dtype=torch.bfloat16)
    kernels.cast[(1,)](x, o, 8)
    torch.testing.assert_close(o, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_float_argument_is_fp32_and_promotes_bf16():
    x, o = torch.ones(N, dtype=torch.bfloat16), torch.empty(N)
    kernels.scaled[(1,)](x, o, 1 / 3, N)
    assert torch.equal(o, torch.full((N,), 1 / 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["max", "min", "argmax", "argmin", "last"])
def test_reductions_that_choose_an_element_choose_the_one_torch_chooses(op, dtype, rng):
    x = numbers(rng, dtype, 8, 64)
    expected = {"max": x.amax, "min": x.amin, "argmax": x.argmax, "argmin": x.argmin}
    expected = x[:, -1] if op == "last" else expected[op](1)
    o = torch.empty_like(expected)
    kernels.reduction[(1,)](x, o, op, 8, 64)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("op", ["max", "argmax"])
def test_a_maximum_passes_over_nans(op):
    x = torch.tensor([[NAN, 1.0, 3.0, NAN], [NAN, NAN, -2.0, -5.0]])
    o = torch.empty(2)
    kernels.reduction[(1,)](x, o, op, 2, 4)
    assert o.tolist() == ([3, -2] if op == "max" else [2, 2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["sum", "product"])
def test_reductions_err_by_the_roundings_of_their_dtype(op, dtype, rng):
    epsilon = torch.finfo(dtype).eps / 2
    x = (1 + torch.rand(64, 64, generator=rng)).to(dtype)
    expected = x.double().sum(1) if op == "sum" else x.double()[:, :8].prod(1)
    n = 64 if op == "sum" else 8
    o = torch.empty(64, dtype=dtype)
    kernels.reduction[(1,)](x[:, :n].contiguous(), o, op, 64, n)
    error = ((o.double() - expected) / expected).abs().max().item()
    assert error < n.bit_length() * epsilon
    if dtype != torch.float32:
        assert error > epsilon / 2  # it rounds at all


def test_a_reduction_over_all_axes_is_one_number(rng):
    x, o = 1 + torch.rand(4, 8, generator=rng), torch.empty(4)
    kernels.reduction[(1,)](x, o, "product of all", 4, 8)
    torch.testing.assert_close(o, x.prod().expand(4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["cumsum", "reversed", "recurrence"])
def test_scans_agree_with_loops(op, dtype, rng):
    x, decay = (
        torch.rand(8, 32, generator=rng).to(dtype),
        torch.rand(8, 32, generator=rng).to(dtype),
    )
    o = torch.empty_like(x)
    kernels.scan[(1,)](x, decay, o, op, 8, 32)
    values, state, rows = x.double(), torch.zeros(8, dtype=torch.float64), []
    for t in range(32):
        state = (state * decay[:, t] if op == "recurrence" else state) + values[:, t]
        rows.append(state)
    expected = torch.stack(rows, 1)
    if op == "reversed":
        expected = values.sum(1, keepdim=True) - expected + values
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "precision", "least", "most"),
    [
        (torch.bfloat16, "tf32", 0, 1e-6),  # fp32 sums of exact products
        (torch.float16, "tf32", 0, 1e-6),
        (torch.float32, "ieee", 0, 1e-6),
        (torch.float32, "tf32x3", 1e-8, 2e-6),
        (torch.float32, "bf16x6", 1e-8, 1e-6),
        (torch.float32, "bf16x3", 1e-6, 1e-5),
        (torch.float32, "tf32", 1e-4, 1e-3),  # operands truncated to 11 bits
    ],
)
def test_products_err_like_their_precision(dtype, precision, least, most, rng):
    a, b = (torch.randn(64, 64, generator=rng).to(dtype) for _ in range(2))
    o = torch.empty(64, 64)
    kernels.product[(1,)](a, b, o, precision, 64)
    expected = a.double() @ b.double()
    error = ((o.double() - expected).norm() / expected.norm()).item()
    assert least <= error <= most


def test_an_int8_product_accumulates_in_int32():
    a = torch.full((64, 64), 127, dtype=torch.int8)
    o = torch.empty(64, 64, dtype=torch.int32)
    kernels.product[(1,)](a, a, o, "ieee", 64)
    assert (o == 64 * 127 * 127).all()


def test_a_bf16_accumulator_shows_beside_fp64():
    x = torch.rand(1 << 14, generator=torch.Generator().manual_seed(0))
    errors = {}
    for dtype in (kernels.tl.float32, kernels.tl.bfloat16):
        o = torch.empty(1)
        kernels.row_sum[(1,)](x, o, len(x), dtype, 16)
        errors[dtype] = abs(o.item() / x.double().sum().item() - 1)
    assert errors[kernels.tl.float32] < 1e-5
    assert errors[kernels.tl.bfloat16] > 1e-2


def test_none_is_an_absent_pointer():
    x, o = torch.ones(16), torch.empty(16)
    kernels.optional[(1,)](x, None, o, 16)
    assert torch.equal(o, x)
    kernels.optional[(1,)](x, x, o, 16)
    assert torch.equal(o, 2 * x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
def test_masked_lanes_are_undefined_unless_other_defines_them(dtype):
    x, o = torch.ones(16, dtype=dtype), torch.empty(1, dtype=dtype)
    kernels.masked_sum[(1,)](x, o, 9, 0, 16)
    assert o.item() == 9
    kernels.masked_sum[(1,)](x, o, 9, None, 16)
    assert o.item() != 9


def test_what_no_gpu_can_do_is_refused():
    x = torch.ones(8, 8, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="K >= 16"):
        kernels.product[(1,)](x, x, torch.empty(8, 8), "ieee", 8)
    with pytest.raises(ValueError, match=r"grid of \(1, 65536, 1\)"):
        kernels.asserts[(1, 65536)](x, 16)


def test_device_assert_asserts():
    kernels.asserts[(1,)](torch.ones(16), 16)
    with pytest.raises(AssertionError, match="x is positive"):
        kernels.asserts[(1,)](torch.zeros(16), 16)


def test_an_int32_overflow_is_reported_on_request():
    x, o = torch.full((16,), 1 << 15, dtype=torch.int32), torch.empty(16, dtype=torch.int32)
    kernels.wraps[(1,)](x, o, 16)
    assert (o == -(2**31)).all()
    with sanitizer.checked(overflow=True), pytest.raises(AssertionError, match="overflow"):
        kernels.wraps[(1,)](x, o, 16)


def test_installing_again_changes_nothing():
    interpreter.install()
    x, o = torch.ones(16), torch.empty(16)
    kernels.optional[(1,)](x, x, o, 16)
    assert torch.equal(o, 2 * x)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_is_rounded_to_the_nearest_and_saturates(dtype, rng):
    """Judged by the list of all fp8 numbers."""
    every = torch.arange(256).to(torch.uint8).view(dtype).float()
    every = every[every.isfinite()].unique()
    x = torch.cat([numbers(rng, torch.float32, N - 4), torch.tensor([1e-9, 1e6, -1e6, 2.7e-40])])
    o, back = torch.empty(N, dtype=dtype), torch.empty(N)
    kernels.convert[(1,)](x, o, N)
    kernels.convert[(1,)](o, back, N)
    nearest = (x[:, None] - every).abs().min(1)
    assert back.equal(o.float())
    assert (x - back).abs().equal(nearest.values)
    kernels.convert[(1,)](torch.full((N,), NAN), o, N)
    assert o.float().isnan().all()


def test_a_fused_product_and_sum_of_bf16_is_rounded_once():
    """1.0625^2 lies in the middle of two bf16 numbers: the tiny third term decides."""
    x = torch.full((N,), 1.0625, dtype=torch.bfloat16)
    for tiny, want in ((2.0**-40, 1.1328125), (-(2.0**-40), 1.125), (2.0**-120, 1.1328125)):
        o = torch.empty_like(x)
        kernels.fma[(1,)](x, x, torch.full_like(x, tiny), o, N)
        assert o.eq(want).all()


def test_fp16_toward_zero_stays_finite():
    x = torch.tensor([1e6, -65557.0, 65519.0, 1.0004, -1.0004, INF]).repeat(N // 4)[:N].contiguous()
    o = torch.empty(N, dtype=torch.float16)
    kernels.convert_toward_zero[(1,)](x, o, N)
    assert o[:6].tolist() == [65504, -65504, 65504, 1, -1, INF]


def test_grids_may_ask_for_arguments_and_keywords_are_known():
    x, o = torch.ones(N), torch.zeros(N)
    kernels.convert[lambda arguments: (arguments["N"] // N,)](x, o, N=N, num_warps=8)
    assert o.equal(x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'M'"):
        kernels.convert[(1,)](x, o, N=N, M=4)
    with pytest.raises(TypeError, match="the grid is 3, needs 1 to 3 integers"):
        kernels.convert[3](x, o, N)
