"""What the emulator computes, and that it and the sanitizers find what is wrong."""

import functools
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gpu_on_cpu.cuda import KernelError, build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the switch of stacks is written for x86-64"
)
KERNELS = Path(__file__).with_name("test_kernels")
PLAIN, ADDRESS, THREAD = BUILDS = (None, "address", "thread")


@functools.cache
def programs():
    """All builds, two at a time: compilers take longer than the tests."""
    wanted = [(name, sanitizer) for name in ("planted", "instructions") for sanitizer in BUILDS]
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda w: build(KERNELS / f"{w[0]}.cpp", sanitizer=w[1]), wanted)
        return dict(zip(wanted, built, strict=True))


def program(name, sanitizer=None):
    return programs()[name, sanitizer]


# ---------------------------------------------------------------------------- planted bugs


def run_planted(kernel, sanitizer, blocks=2, order=0):
    x = torch.arange(64.0 * blocks)
    y = torch.full_like(x, torch.nan)
    arrived = torch.zeros(1, dtype=torch.int32)
    partial = torch.full((2 * blocks,), torch.nan)
    program("planted", sanitizer)(
        kernel=kernel, x=x, y=y, blocks=blocks, arrived=arrived, partial=partial, order=order
    )
    return x, y


def reversed_with_sums(x):
    warps = x.view(-1, 2, 32)
    return (warps.flatten(1).flip(1).view_as(warps) + warps.sum(-1, keepdim=True)).flatten()


@pytest.mark.parametrize("sanitizer", BUILDS)
def test_right_kernels_are_right_and_clean(sanitizer):
    x, y = run_planted("none", sanitizer)
    assert torch.equal(y, reversed_with_sums(x))
    x, y = run_planted("vectors", sanitizer)
    assert torch.equal(y, x)
    x, y = run_planted("matrix", sanitizer)
    assert torch.equal(y[:32], x[:32])
    x, y = run_planted("warp", sanitizer)
    assert torch.equal(y[:32], x[:32].flip(0))
    for kernel in ("sum", "sum_acq_rel"):
        x, y = run_planted(kernel, sanitizer, blocks=5)
        assert y[0] == 10


# What is planted, the build that notices, what it says, and a part of the line it says it of.
OVERRUN, RACE, NOT_SHARED = "buffer-overflow", "data race", "not inside of shared memory"
PLANTED = [
    ("global_read", ADDRESS, "heap-" + OVERRUN, "in[first + i + 1]"),
    ("global_write", ADDRESS, "heap-" + OVERRUN, "out["),
    ("static_shared", ADDRESS, "insufficient space|global-" + OVERRUN, "own["),
    ("dynamic_shared", ADDRESS, "use-after-poison", "tile[i + 1] = 0"),
    ("local_array", ADDRESS, "out of bounds|stack-" + OVERRUN, "result[warp] = 0"),
    ("misaligned_load", PLAIN, "misaligned access of 16 bytes", "__ldcs"),
    ("misaligned_store", ADDRESS, "misaligned address", "out + i + (kBug"),
    ("misaligned_row", PLAIN, "misaligned row", "ldmatrix"),
    *(("row_elsewhere", build, NOT_SHARED, "ldmatrix") for build in (PLAIN, ADDRESS)),
    ("no_wait", ADDRESS, "use-after-poison", "x = tile["),
    *(("no_wait", build, "copies in flight", "__syncthreads()") for build in (PLAIN, THREAD)),
    *(("copy_out_of_shared", build, NOT_SHARED, "cp_async<4>(tile") for build in (PLAIN, ADDRESS)),
    ("two_copies", PLAIN, "another copy to the same bytes", "two_copies"),
    ("divergent_barrier", PLAIN, "diverges", "__syncthreads()"),
    ("half_warp", PLAIN, "deadlock.*__shfl_xor_sync", "__shfl_xor_sync"),
    ("lane_outside", PLAIN, "lacks lane 16", "__shfl_xor_sync"),
    ("no_barrier", THREAD, RACE, "x = tile["),
    ("late_barrier", THREAD, RACE, "x = tile["),
    ("divergent_barrier", THREAD, RACE, "tile["),
    ("no_warp_barrier", THREAD, RACE, "tile["),
    ("early_copy", THREAD, RACE, "cp_async<4>(tile + i, in"),
    ("same_output", THREAD, RACE, "out["),
    ("no_release", THREAD, RACE, "partial[2 * b]"),
    ("no_acquire", THREAD, RACE, "partial[2 * b]"),
]


@pytest.mark.parametrize(("kernel", "sanitizer", "says", "line"), PLANTED)
def test_planted_bug_is_found_with_its_line(kernel, sanitizer, says, line):
    with pytest.raises(KernelError, match=says) as raised:
        run_planted(kernel, sanitizer)
    source = (KERNELS / "planted.cuh").read_text().splitlines()
    numbers = re.findall(r"planted\.cuh:(\d+)", str(raised.value))
    assert any(line in source[int(number) - 1] for number in numbers), str(raised.value)


@pytest.mark.parametrize("kernel", ["no_barrier", "late_barrier"])
def test_missing_barrier_shows_in_the_results_of_a_plain_build(kernel):
    _, y = run_planted(kernel, PLAIN)
    assert y.isnan().any()  # shared memory that nobody has written yet


@pytest.mark.parametrize("order", [1, 2])
def test_order_changes_what_runs_first_and_not_the_results(order):
    x, y = run_planted("none", PLAIN, order=order)
    assert torch.equal(y, reversed_with_sums(x))
    _, last = run_planted("same_output", PLAIN, blocks=8, order=order)
    _, last_in_order = run_planted("same_output", PLAIN, blocks=8)
    assert not torch.equal(last[:64], last_in_order[:64])


# ---------------------------------------------------------------------------- instructions


def run_instruction(kernel, x, y, sanitizer=None, **arguments):
    program("instructions", sanitizer)(kernel=kernel, x=x, y=y, **arguments)
    return y


def test_shuffles_and_votes_are_those_of_cuda():
    x = torch.arange(32, dtype=torch.int32) * 7 + 3
    lane = torch.arange(32)
    of_three = x % 3 == 0
    ballot = sum(1 << int(i) for i in lane[of_three])
    expected = [
        x[5].expand(32),
        x[lane // 8 * 8 + (lane + 1) % 8],
        x[torch.where(lane >= 3, lane - 3, lane)],
        x[torch.where(lane % 8 >= 3, lane - 3, lane)],
        x[torch.where(lane < 29, lane + 3, lane)],
        x[torch.where(lane % 8 < 5, lane + 3, lane)],
        x[lane ^ 9],
        torch.full((32,), ballot),
        torch.ones(32),
        torch.zeros(32),
        torch.where(lane < 16, ballot & 0xFFFF, ballot & 0xFFFF0000),
    ]
    y = run_instruction("warp", x, torch.zeros(len(expected), 32, dtype=torch.int32))
    for got, wanted in zip(y, expected, strict=True):
        assert torch.equal(got, wanted.to(torch.int64).to(torch.int32))


@pytest.mark.parametrize("sanitizer", BUILDS)
def test_atomics_add_up_over_blocks(sanitizer):
    x = torch.randint(-1000, 1000, (3, 32), dtype=torch.int32)
    y = run_instruction("atomics", x, torch.zeros(5, dtype=torch.int32), sanitizer)
    xor = functools.reduce(lambda a, b: a ^ b, x.flatten().tolist())
    assert y.tolist() == [x.sum(), max(x.max(), 0), min(x.min(), 0), 96 % 5, xor]


def test_conversions_are_those_of_torch():
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,)).to(torch.int32)
    ties = torch.arange(0x3F800000, 0x40800000, 0x800, dtype=torch.int32)  # of 16-bit formats
    x = torch.cat([bits, ties, torch.tensor([0.0, -0.0, 1e-8, 65519.9, 65520.0]).view(torch.int32)])
    x = x.view(torch.float32)
    x = x[~x.isnan()]
    y = torch.empty(len(x), dtype=torch.int32)
    bf16, f16 = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.half)
    back = torch.empty_like(x)
    run_instruction("conversions", x, y, n=len(x), bf16=bf16, f16=f16, back=back)
    assert torch.equal(bf16, x.bfloat16())
    assert torch.equal(f16, x.half())
    assert torch.equal(back, x.half().float())
    mantissa = torch.frexp(x.double())
    rounded = torch.sign(x) * torch.floor(mantissa.mantissa.abs() * 2**11 + 0.5)  # away from zero
    tf32 = torch.ldexp(rounded, mantissa.exponent - 11)
    normal = x.isfinite() & (x.abs() >= 2**-126) & (tf32.abs() < 2.0**128)
    assert torch.equal(y.view(torch.float32)[normal].double(), tf32[normal])


def test_extremes_of_pairs_are_those_of_torch():
    values = torch.tensor([0.0, 1.5, -2.0, 3e38, float("inf"), float("-inf"), float("nan")])
    a, b = (x.flatten().bfloat16() for x in torch.meshgrid(values, values[:6], indexing="ij"))
    y = run_instruction("extremes", a, torch.empty(2, len(a)).bfloat16(), b=b, n=len(a) // 2)
    torch.testing.assert_close(y[0], torch.minimum(a, b), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y[1], torch.maximum(a, b), rtol=0, atol=0, equal_nan=True)


def normal(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("kernel", "dtype", "sanitizer"),
    [
        ("mma_bf16", torch.bfloat16, PLAIN),
        ("mma_f16", torch.half, PLAIN),
        ("mma_tf32", torch.float32, PLAIN),
        *(("ldmatrix_mma_bf16", torch.bfloat16, build) for build in BUILDS),
    ],
)
def test_fragments_lie_as_the_ptx_isa_says(kernel, dtype, sanitizer):
    k = 8 if dtype == torch.float32 else 16
    a, b = normal(16, k, dtype=dtype), normal(k + 1, 8, dtype=dtype)[1:]
    c = run_instruction(kernel, a, torch.empty(16, 8), sanitizer, b=b)
    eps = 2**-11 if dtype == torch.float32 else 2**-22  # of tf32; of sums in fp32
    bound = 2 * eps * (a.double().abs() @ b.double().abs())
    assert ((c - a.double() @ b.double()).abs() <= bound).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_deals_rows_as_the_ptx_isa_says(matrices, transposed):
    x = torch.arange(matrices * 64, dtype=torch.int16).view(matrices, 8, 8)
    y = torch.empty(matrices, 32, 2, dtype=torch.int16)
    run_instruction("ldmatrix", x, y, matrices=matrices, transposed=transposed)
    # Lane l has row l / 4, elements 2 (l % 4) and the next: the matrix, read in order.
    assert torch.equal(y.view_as(x), x.mT if transposed else x)


@pytest.mark.parametrize("sanitizer", [PLAIN, ADDRESS])
@pytest.mark.parametrize(("size", "count"), [(4, 4), (4, 2), (8, 6), (16, 16), (16, 3), (16, 0)])
def test_partial_copies_read_no_more_and_fill_with_zeros(size, count, sanitizer):
    x = torch.arange(1, count + 1, dtype=torch.uint8)  # behind it is another's memory
    y = torch.full((size,), 255, dtype=torch.uint8)
    run_instruction("copy_part", x, y, sanitizer, bytes=size, count=count)
    assert y.tolist() == x.tolist() + [0] * (size - count)


def test_older_copies_land_while_newer_ones_are_in_flight():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(run_instruction("wait_for_older", x, torch.zeros(2), ADDRESS), x)


@pytest.mark.parametrize(
    ("blocks", "says"), [(0, "no GPU launches a grid"), (2**31, "no GPU launches a grid")]
)
def test_launches_that_no_gpu_accepts_are_refused(blocks, says):
    with pytest.raises(KernelError, match=says):
        program("planted")(kernel="none", x=torch.zeros(64), y=torch.zeros(64), blocks=blocks)


def test_strided_tensors_keep_their_gaps():
    x = torch.arange(16, dtype=torch.int32).view(4, 4)[:, :1]
    before = x.as_strided((13,), (1,)).clone()
    y = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(KernelError, match=r"heap-buffer-overflow.*instructions\.cuh"):
        run_instruction("atomics", x, y, ADDRESS)  # which reads 96 numbers of the 13
    assert torch.equal(x.as_strided((13,), (1,)), before)


def test_names_and_sanitizers_that_there_are_not_are_named():
    with pytest.raises(KernelError, match="no tensor y"):
        program("instructions")(kernel="warp", x=torch.zeros(32, dtype=torch.int32))
    with pytest.raises(ValueError, match="sanitizer is 'memory', needs one of"):
        build(KERNELS / "instructions.cpp", sanitizer="memory")
