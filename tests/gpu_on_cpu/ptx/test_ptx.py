"""Kernels that Triton compiled give right results, and every check notices the bug it is for."""

import re

import pytest

from gpu_on_cpu.ahead_of_time import Job, build_all
from gpu_on_cpu.ptx import Fault, Hazard, PtxKernel

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ARCHS = (80, 90)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of dots: dtype, precision, and how far they may be from float64, relative in the Frobenius norm.
# 2^-9, 2^-12: what storing the result rounds; tf32 rounds what it reads to 11 bits.
DOTS = {
    "bf16": ("bf16", "tf32", 2.0**-8),
    "fp16": ("fp16", "tf32", 2.0**-11),
    "tf32": ("fp32", "tf32", 2.0**-9),
    "tf32x3": ("fp32", "tf32x3", 1e-6),
    "ieee": ("fp32", "ieee", 1e-6),
}


def _job(kernel: str, arguments: dict, arch: int = 80, **options: int) -> Job:
    return Job("gpu_on_cpu.ptx.triton_kernels", kernel, arguments, f"sm_{arch}", **options)


def _matmul(dot: str, arch: int, **options: int) -> Job:
    dtype, precision, _ = DOTS[dot]
    tensors = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), f"*{dtype}")
    sizes = {"M": 96, "N": 80, "K": 112, "BLOCK": 64, "BK": 32, "P": f"={precision}"}
    return _job("matmul", {**tensors, **sizes}, arch, **{"num_stages": 3, **options})


def _attention(arch: int) -> Job:
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), "*bf16")
    return _job("attention", {**tensors, "T": 7, "scale": 0.5, "D": 64, "C": 64}, arch)


_FEATURES = {
    "x_ptr": "*fp32",
    "flags_ptr": "*i8",
    "index_ptr": "*i64",
    "y_ptr": "*fp32",
    "where_ptr": "*i64",
    "n": 7,
    "twice": 7,
    "N": 512,
}
JOBS = {
    **{f"matmul {dot} {arch}": _matmul(dot, arch) for dot in DOTS for arch in ARCHS},
    "matmul narrow": _matmul("tf32x3", 80, num_warps=8, num_stages=1),
    **{f"attention {arch}": _attention(arch) for arch in ARCHS},
    **{f"features {arch}": _job("features", _FEATURES, arch) for arch in ARCHS},
    "copy": _job("copy", {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": 7, "BLOCK": 512}),
    "wide copy": _job("copy", {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": 16, "BLOCK": 512}),
    "column": _job("copy_column", {"x_ptr": "*fp32", "y_ptr": "*fp32", "stride": 16, "BLOCK": 128}),
    "everywhere": _job("store_everywhere", {"y_ptr": "*fp32", "BLOCK": 128}),
    "atomics": _job(
        "atomics",
        {"x_ptr": "*fp32", "sum_ptr": "*fp32", "lock_ptr": "*i32", "count_ptr": "*i32", "N": 128},
    ),
}


@pytest.fixture(scope="module")
def builds():
    return dict(zip(JOBS, build_all(list(JOBS.values()), keep_asm=True), strict=True))


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def delete(ptx: str, pattern: str, which: int = 0) -> str:
    """PTX without the statement that matches, out of all that do the one of that number."""
    match = list(re.finditer(pattern, ptx))[which]
    return ptx[: match.start()] + ptx[match.end() :]


def run_matmul(built, dot="bf16", ptx=None, shape=(96, 80, 112), **options):
    """The report of a launch, and its relative error."""
    M, N, K = shape
    dtype = DTYPES[DOTS[dot][0]]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((M, K), (K, N)))
    c = torch.full((M, N), float("nan"), dtype=dtype)
    kernel = PtxKernel(ptx or built.asm["ptx"])
    grid = (-(-M // 64), -(-N // 64))
    report = kernel(
        grid, [a, b, c, M, N, K], shared_bytes=built.resources["shared_bytes"], **options
    )
    return report, relative_error(c, a.double() @ b.double())


# ---------------------------------------------------------------------------- right results


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dot", DOTS)
def test_a_product_is_right_in_every_precision(builds, dot, arch):
    report, error = run_matmul(builds[f"matmul {dot} {arch}"], dot, check_blocks=True)
    report.assert_clean()
    assert error < DOTS[dot][2]
    opcodes = " ".join(report.instructions)
    expected = "fma.rn.f32" if dot == "ieee" else "wgmma.mma_async" if arch == 90 else "mma.sync"
    assert expected in opcodes


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("order", [None, 1, 2])
def test_attention_is_right_in_any_order_of_execution(builds, arch, order):
    built, T, heads = builds[f"attention {arch}"], 150, 2
    q, k, v = torch.randn(3, heads, T, 64).to(torch.bfloat16)
    o = torch.full_like(q, float("nan"))
    arguments = [q, k, v, o, T, 64**-0.5 * 1.4426950408889634]
    report = PtxKernel(built.asm["ptx"])(
        (3, heads),
        arguments,
        shared_bytes=built.resources["shared_bytes"],
        order=order,
        check_blocks=True,
    )
    report.assert_clean()
    weights = (q.double() @ k.double().mT * 64**-0.5).masked_fill(
        torch.ones(T, T).triu(1).bool(), float("-inf")
    )
    assert relative_error(o, weights.softmax(-1) @ v.double()) < 2.0**-7


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("twice", [0, 1])
def test_types_scans_layouts_and_branches_are_right(builds, arch, twice):
    built, n, N = builds[f"features {arch}"], 700, 512
    x, index = torch.randn(2 * N), torch.randint(-20, 20, (2 * N,))
    flags = torch.randint(0, 2, (2 * N,), dtype=torch.int8)
    y, where = torch.full((2 * N,), float("nan")), torch.zeros(2, dtype=torch.int64)
    expected = _features(x, flags, index, n, twice, N)
    kernel = PtxKernel(built.asm["ptx"])
    arguments = [x, flags, index, y, where, n, twice]
    kernel((2,), arguments, shared_bytes=built.resources["shared_bytes"]).assert_clean()
    for got, want in zip((y[:n], where, flags[:n]), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert y[n:].isnan().all()


def _features(x, flags, index, n, twice, N):
    """The kernel `features` in torch."""
    inside = torch.arange(len(x)) < n
    x, flags, index = (torch.where(inside, t, 0) for t in (x, flags, index))
    x = x * 2 if twice else x
    for step in range(2):
        x = torch.where(flags != 0, x, (x.abs() + 1 + step).log() + x.abs().sqrt())
    x = x + torch.fmod(index, 7) - torch.div(index, 3, rounding_mode="trunc")
    x = x.reshape(-1, N)
    square = x.reshape(-1, N // 8, 8).mT
    square = square + square.sum(1, keepdim=True) * square.amax(2, keepdim=True)
    y = square.mT.reshape(-1, N).cumsum(1).flatten()
    return y[:n], x.argmax(1), (x.flatten()[:n] > 0).to(torch.int8)


def test_atomics_add_up_and_locks_exclude(builds):
    x = torch.randn(5 * 128)
    total, lock, count = torch.zeros(4), torch.zeros(1).int(), torch.zeros(1).int()
    report = PtxKernel(builds["atomics"].asm["ptx"])((5,), [x, total, lock, count], shared_bytes=64)
    torch.testing.assert_close(total, x.reshape(-1, 4).sum(0), rtol=1e-5, atol=1e-5)
    assert (lock.item(), count.item()) == (0, 5)
    assert report.global_bytes[1].atomic == x.numel() * 4


# ---------------------------------------------------------------------------- planted bugs


@pytest.mark.parametrize("arch", ARCHS)
def test_every_deleted_barrier_that_matters_is_a_race(builds, arch):
    """Two stand side by side at the end, and one of them may go."""
    built = builds[f"matmul tf32x3 {arch}"]
    barriers = built.asm["ptx"].count("bar.sync")
    races = [
        run_matmul(built, "tf32x3", delete(built.asm["ptx"], r"bar\.sync\s+0;", n))[0].races
        for n in range(barriers)
    ]
    noticed = [bool(found) for found in races]
    assert sum(noticed) >= barriers - 1, noticed
    message = str(next(found for found in races if found)[0])
    assert re.search(r"warp \d (reads|writes) shared byte \d+ by `[a-z]+.*warp \d", message)


def test_a_race_is_found_in_any_order(builds):
    built = builds["matmul bf16 80"]
    ptx = delete(built.asm["ptx"], r"bar\.sync\s+0;")
    for order in (None, 0, 1, 2):
        assert run_matmul(built, ptx=ptx, order=order)[0].races


def test_a_copy_that_nobody_waits_for_is_found(builds):
    built = builds["matmul bf16 80"]
    first = delete(built.asm["ptx"], r"cp\.async\.wait_group\s+2;")
    report, _ = run_matmul(built, ptx=first)
    assert Hazard.COPY in {f.hazard for f in report.races}
    last = delete(built.asm["ptx"], r"cp\.async\.wait_group\s+0;")
    report, _ = run_matmul(built, ptx=last)
    assert Hazard.UNFINISHED in {f.hazard for f in report.races}


def test_a_wait_for_too_few_copies_is_found(builds):
    built = builds["matmul bf16 80"]
    ptx = re.sub(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;", built.asm["ptx"])
    assert ptx != built.asm["ptx"]
    report, _ = run_matmul(built, ptx=ptx)
    assert any("has not been waited for" in str(f) for f in report.races)


def test_a_wgmma_that_nobody_waits_for_is_found(builds):
    built = builds["matmul bf16 90"]
    for n in range(built.asm["ptx"].count("wgmma.wait_group")):
        ptx = delete(built.asm["ptx"], r"wgmma\.wait_group\.sync\.aligned\s+\d+;", n)
        report, _ = run_matmul(built, ptx=ptx)
        assert {f.hazard for f in report.races} & {Hazard.ACCUMULATOR, Hazard.OPERAND}, n


def test_a_missing_proxy_fence_is_found(builds):
    built = builds["matmul tf32x3 90"]
    ptx = re.sub(r"fence\.proxy\.async[^;]*;", "", built.asm["ptx"])
    report, _ = run_matmul(built, "tf32x3", ptx)
    assert {f.hazard for f in report.races} == {Hazard.FENCE}


def test_a_truncated_accumulator_shows_in_the_error(builds):
    built = builds["matmul bf16 80"]
    mma = r"(mma\.sync[^{]*\{\s*(%r\d+), (%r\d+), (%r\d+), (%r\d+)\s*\}[^;]*;)"
    truncate = "".join(rf" and.b32 \{n}, \{n}, 0xffff0000;" for n in range(2, 6))
    ptx = re.sub(mma, r"\1" + truncate, built.asm["ptx"])
    assert ptx != built.asm["ptx"]
    assert run_matmul(built, ptx=ptx)[1] > DOTS["bf16"][2]


def test_reading_past_the_end_names_instruction_argument_and_distance(builds):
    x, y = torch.randn(1001), torch.zeros(1002)
    kernel = PtxKernel(builds["copy"].asm["ptx"].replace("setp.lt.s32", "setp.le.s32"))
    with pytest.raises(Fault, match="4 bytes that end 4 bytes past the end of argument 0") as error:
        kernel((2,), [x, y, 1001])
    where = r"`@%p\d ld\.global.*` \(triton_kernels\.py:\d+\), block \(1, 0, 0\), thread \d+"
    assert re.search(where, str(error.value))


def test_a_tensor_ends_where_it_ends_even_if_another_one_follows(builds):
    both = torch.randn(2000)
    with pytest.raises(Fault, match="end 4 bytes past the end of argument 1"):
        PtxKernel(builds["copy"].asm["ptx"])((2,), [torch.randn(1000), both[:999], 1000])
    PtxKernel(builds["copy"].asm["ptx"])((2,), [both[:1000], both[1000:], 1000])
    assert torch.equal(both[:1000], both[1000:])


def test_a_misaligned_vector_is_found(builds):
    x, y = torch.randn(1025), torch.zeros(1024)
    kernel = PtxKernel(builds["wide copy"].asm["ptx"])
    kernel((2,), [x[:1024], y, 1024])
    with pytest.raises(Fault, match=r"misaligned: 16 bytes at an address that is 4 modulo 16"):
        kernel((2,), [x[1:], y, 1024])


def test_warps_that_do_the_same_work_are_no_race_but_named(builds):
    """Eight warps on a tile that has work for four."""
    report, error = run_matmul(builds["matmul narrow"], "tf32x3")
    assert error < 1e-6
    assert not report.races
    assert report.duplicates


def test_blocks_that_store_to_the_same_bytes_conflict(builds):
    kernel, y = PtxKernel(builds["everywhere"].asm["ptx"]), torch.zeros(128)
    assert not kernel((1,), [y], check_blocks=True).block_conflicts
    (conflict,) = kernel((2,), [y], check_blocks=True).block_conflicts
    assert "block (1, 0, 0) writes" in str(conflict)


# ---------------------------------------------------------------------------- counts


def test_bytes_of_a_copy_are_exact(builds):
    x, y = torch.randn(1001), torch.zeros(1001)
    report = PtxKernel(builds["copy"].asm["ptx"])((2,), [x, y, 1001])
    assert torch.equal(x, y)
    assert report.global_bytes[0].loaded == report.global_bytes[1].stored == 4004
    assert report.global_bytes[0].stored == report.global_bytes[1].loaded == 0


def test_coalesced_accesses_move_no_more_than_they_need(builds):
    x, y = torch.empty(1024), torch.empty(1024)
    report = PtxKernel(builds["wide copy"].asm["ptx"])((2,), [x, y, 1024])
    # The allocator aligns tensors to 64 bytes, hence to sectors.
    assert report.global_bytes[0].sectors == report.global_bytes[0].loaded
    assert all(access.sectors == access.ideal_sectors for access in report.accesses)


def test_a_strided_access_wastes_sectors(builds):
    x, y = torch.randn(128, 16), torch.zeros(128)
    report = PtxKernel(builds["column"].asm["ptx"])((1,), [x, y, 16])
    assert torch.equal(y, x[:, 0])
    assert report.global_bytes[0].loaded == 4 * 128
    assert report.global_bytes[0].sectors == 32 * 128
    load = next(access for access in report.accesses if access.instruction.startswith("ld", -60))
    assert load.sectors == 8 * load.ideal_sectors


def test_instructions_are_counted_by_warp(builds):
    report, _ = run_matmul(builds["matmul bf16 80"], shape=(64, 64, 112))
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    # 4 steps of 32 cover 112: 64 x 64 x 128 multiplications, 16 x 8 x 16 each.
    assert report.instructions[mma] == 64 * 64 * 128 // (16 * 8 * 16)
