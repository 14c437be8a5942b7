"""hybrid_attention and linear_attention in CUDA C++ against the fp64 reference, run by the emulator
(gpu_on_cpu.cuda), through the C ABI's checks and the plan."""

from dataclasses import replace

import pytest
import torch
from gpu_on_cpu.cuda.program import KernelError
from helpers import emulated, operators
from helpers.cases import FACTORS, Case, cases, make_inputs
from helpers.compare import assert_close
from helpers.emulated_attention import (
    LARGE,
    LARGEST,
    NARROW,
    ONE,
    ONE_FP16,
    ONE_FP32,
    ONE_LARGE,
    ONE_WIDE,
    SM_86,
    SMALLEST,
    WIDE,
    Kernels,
    program,
)

import lolcats_ops as lo
from lolcats_ops._libraries import load_torch_ops

pytestmark = pytest.mark.usefixtures("one_thread")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def check(call, case, instances=NARROW, **settings):
    """Outputs against the reference; returns the kernels, with what they left for backward."""
    kernels = Kernels(program(instances, **settings))
    want = operators.expected(call, case).outputs
    compare(call(kernels, make_inputs(case).as_dtype(case.dtype, case.layout)), want, case.dtype)
    return kernels


def compare(got, want, dtype):
    for name, y in got.items():
        assert_close(name, y, want[name].detach(), dtype, floor=1e-3)


# Two-sided and narrow: one pair of kernels runs them all. Windows below, at and above a tile.
SMALL = {
    "D": (16, 60, 64),
    "V": ("D", 20, 72),
    "f": (24, 64),
    "G": (1, 3),
    "batch": ((1, 1), (2, 1), (1, 2)),
    "window": (0, 1, 16, 64, 100),
    "sink": (0, 1, 4, 37),
    "length": ("0", "1", "w-1", "w+1", "3w+7"),
    "activation": ("softmax", "exp"),
    "two_sided": (True,),
    "skip": (False,),
    "packing": (None, "left", "right", "packed"),
    "dtype": (FP32, BF16, FP16),
}
# One-sided: every activation, and q and k as the features.
ONE_SIDED = {
    **SMALL,
    "f": ("D", 24),
    "two_sided": (False,),
    "skip": (False, True),
    "activation": FACTORS["activation"],
    "dtype": (BF16, FP16),
}


def name(value):
    """Of an operator or a case."""
    return getattr(value, "__name__", str(value))


def small(factors, *names):
    others = {n: factors.get(n, FACTORS[n]) for n in names}
    selected = cases(**others)
    return pytest.mark.parametrize("case", selected, ids=map(str, selected))


@small(SMALL, *operators.HYBRID)
def test_hybrid_attention_equals_the_reference(case):
    check(operators.hybrid_attention, case)


@pytest.mark.parametrize(("D", "instances"), [(64, ONE), (128, ONE_WIDE)])
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_maps_that_spread_z_keep_bf16_exact(activation, D, instances):
    attention = Kernels(program(instances)).hybrid_attention
    operators.check_spread(
        attention, 6.0, (D, 64), activation=activation, gradients=False, window=0
    )


def test_numbers_that_fp16_does_not_hold_are_projected():
    """Where maps have exponentials, bf16 is projected in fp16, whose largest number is 65504."""
    x = torch.tensor([-3e38, -1e5, 1e5, 3e38]).bfloat16().expand(1, 1, 4, 4).contiguous()
    phi = lo.Features(torch.eye(4)[None] * 1e-4)
    args = (x, x, torch.ones_like(x), phi, phi, torch.zeros(1))
    assert Kernels(program(ONE)).hybrid_attention(*args, window=0).eq(1).all()


LINEAR = (*operators.MAPS, *operators.SEQUENCES, "activation", "normalize", "initial")


@small(SMALL, *LINEAR)
def test_linear_attention_equals_the_reference(case):
    check(operators.linear_attention, case)


@small(ONE_SIDED, "D", "f", "two_sided", "bias", "skip", "activation", "window", "affine", "dtype")
def test_every_activation(case):
    check(operators.hybrid_attention, case)


@small({**ONE_SIDED, "dtype": (FP16,), "activation": (*FACTORS["activation"], None)}, *LINEAR)
def test_every_activation_of_linear_attention_in_fp16(case):
    check(operators.linear_attention, case)


def test_sums_of_features_beyond_65504_are_held_in_fp16():
    case = Case("500", D=64, activation=None, batch=(1, 1), initial=True, dtype=FP16)
    x = make_inputs(case)
    x.leaves["k"] *= 1024
    want = operators.linear_attention(lo.reference, x)
    assert want["ksum"].min() > 65504
    kernels = Kernels(program(NARROW))
    compare(operators.linear_attention(kernels, x.as_dtype(FP16, "plain")), want, FP16)


def test_small_gates_leave_a_query_its_softmax_part_in_fp16():
    """The first queries of a window have no other; fp16 itself ends at 2^-25."""
    case = Case(D=16, f=8, window=16, batch=(1, 6), dtype=FP16)
    x = make_inputs(case)
    x.leaves["gate"] = torch.tensor([-6.0, -10, -12, -14, -18, -60], dtype=torch.float64)
    want = operators.hybrid_attention(lo.reference, x)
    kernels = Kernels(program(NARROW))
    compare(operators.hybrid_attention(kernels, x.as_dtype(FP16, "plain")), want, FP16)


@pytest.mark.parametrize("affine", [False, True])
def test_a_gate_that_is_nan_makes_nan(affine):
    x = make_inputs(Case(D=16, G=2, window=4, affine=affine)).as_dtype(FP32, "plain")
    with torch.no_grad():
        x.leaves["gate"][0] = float("nan")
        out = operators.hybrid_attention(Kernels(program(NARROW)), x)["out"]
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


def test_small_features_are_kept_in_fp16():
    """phi_q . phi_k of trained maps goes far below what fp16 holds."""
    case = Case("w+1", D=64, f=64, window=60, batch=(1, 4), initial=False, dtype=FP16)
    for seed in range(3):
        x = make_inputs(case, seed)
        for name in ("weight_q", "weight_k"):
            x.leaves[name] *= 12
        want = operators.linear_attention(lo.reference, x)
        kernels = Kernels(program(NARROW))
        compare(operators.linear_attention(kernels, x.as_dtype(FP16, "plain")), want, FP16)


CASES_OF_WIDE = [
    (operators.hybrid_attention, Case(D=128, f=64, G=2, window=64, sink=4, dtype=BF16)),
    (operators.hybrid_attention, Case(D=128, f=64, window=100, sink=37, dtype=BF16)),
    (operators.hybrid_attention, Case(D=96, f=64, window=256, window_kind="terrace", dtype=BF16)),
    (operators.hybrid_attention, Case(D=96, V=72, f=64, sink=4, window=48, dtype=FP32)),
    (operators.hybrid_attention, Case(D=96, V=128, f=64, window=0, sink=37, dtype=BF16)),
    (operators.hybrid_attention, Case(D=96, V=72, f=64, sink=4, activation="relu", dtype=FP16)),
    (operators.linear_attention, Case("500", D=80, f=64, batch=(1, 1), initial=True, dtype=BF16)),
    (operators.linear_attention, Case("500", D=128, f=64, batch=(1, 1), initial=True, dtype=BF16)),
    (operators.hybrid_attention, Case(D=60, f=100, two_sided=False, sink=1, dtype=BF16)),
]


@pytest.mark.parametrize(("call", "case"), CASES_OF_WIDE, ids=name)
def test_wide_heads_and_features(call, case):
    check(call, case, WIDE)


SMALL_PADDED = {"window": 24, "V": 20, "sink": 4, "packing": "left", "batch": (2, 1)}
SMALL_STATE = {"window": 20, "V": 20, "batch": (1, 1), "initial": True}
CASES_OF_LARGE = [
    (operators.hybrid_attention, Case(D=128, dtype=BF16, **SMALL_PADDED)),
    (operators.hybrid_attention, Case(D=96, f=70, activation="exp", dtype=BF16, **SMALL_PADDED)),
    (operators.linear_attention, Case(D=96, two_sided=False, dtype=BF16, **SMALL_STATE)),
    (operators.linear_attention, Case(D=128, activation="favor", dtype=BF16, **SMALL_STATE)),
    (operators.hybrid_attention, Case(D=256, f=64, dtype=BF16, **SMALL_PADDED)),
    (operators.linear_attention, Case(D=256, f=64, dtype=BF16, **SMALL_STATE)),
]
CASES_OF_LARGEST = [
    (operators.hybrid_attention, Case(D=256, dtype=BF16, **SMALL_PADDED)),
    (operators.linear_attention, Case(D=256, activation=None, dtype=BF16, **SMALL_STATE)),
    (operators.hybrid_attention, Case(D=128, f=64, dtype=FP32, **SMALL_PADDED)),
    (operators.linear_attention, Case(D=256, dtype=FP32, **SMALL_STATE)),
    (operators.hybrid_attention, Case(D=128, two_sided=False, dtype=FP32, **SMALL_PADDED)),
    (operators.hybrid_attention, Case(D=128, f=64, activation="relu", dtype=FP16, **SMALL_PADDED)),
    (operators.linear_attention, Case(D=256, activation=None, dtype=FP16, **SMALL_STATE)),
]


@pytest.mark.parametrize(("call", "case"), CASES_OF_LARGE, ids=name)
def test_heads_and_features_of_128_and_256(call, case):
    check(call, case, LARGE)


CASES_OF_SMALLEST = [
    (operators.hybrid_attention, Case(D=96, f=64, dtype=BF16, **SMALL_PADDED)),
    (operators.hybrid_attention, Case(D=128, f=64, dtype=BF16, **SMALL_PADDED)),
    (operators.linear_attention, Case(D=256, dtype=BF16, **SMALL_STATE)),
    (operators.hybrid_attention, Case(D=60, dtype=FP32, **SMALL_PADDED)),
    (operators.hybrid_attention, Case(D=60, activation="elu1", dtype=FP16, **SMALL_PADDED)),
]


@pytest.mark.parametrize(("call", "case"), CASES_OF_LARGEST, ids=name)
def test_instances_that_hold_every_problem(call, case):
    check(call, case, LARGEST)


@pytest.mark.parametrize(("call", "case"), CASES_OF_SMALLEST, ids=name)
def test_gpus_with_little_shared_memory_get_what_fits(call, case):
    check(call, case, SMALLEST, most_shared_bytes=SM_86)


def test_what_fits_no_kernel_says_what_it_needs():
    with pytest.raises(KernelError, match=r"256, 256, 2, 16, 16, 1> needs \d{6} bytes of shared"):
        check(operators.hybrid_attention, Case(D=256, dtype=FP32), most_shared_bytes=SM_86)


def test_long_sequences_keep_their_precision_in_fp16():
    check(operators.linear_attention, Case("2048", D=64, batch=(1, 1), initial=True, dtype=FP16))
    check(operators.hybrid_attention, Case("2048", D=64, batch=(1, 1), dtype=FP16))


@pytest.mark.parametrize(("packing", "B"), [(None, 1), ("packed", 1), ("left", 2)])
def test_backward_gets_the_maxima_and_denominators_of_the_cpu(packing, B):
    case = Case(D=64, G=2, window=64, sink=1, batch=(B, 1), packing=packing, dtype=BF16)
    saved = check(operators.hybrid_attention, case).saved
    x = make_inputs(case).as_dtype(torch.float32, "plain")
    maps = [x.leaves.get(f"{n}_{side}") for side in "qk" for n in ("weight", "bias")]
    codes = (*x.features("q").codes,)
    sequences = (x.sequences.get(n) for n in ("cu_seqlens", "key_padding_mask"))
    args = (*x.qkv, *maps, x.leaves["gate"], *sequences)
    settings = (case.window, 0, case.sink, case.D**-0.5, False, *codes)
    load_torch_ops()
    _, m, den = torch.ops.lolcats_ops.hybrid_attention(*args, *settings)
    assert_close("m", saved.m, m.detach().double(), torch.float32)
    assert_close("den", saved.den, den.detach().double(), BF16)


@pytest.mark.parametrize("window_kind", ["sliding", "terrace"])
def test_a_window_past_32_bits_holds_every_token(window_kind):
    case = Case("500", window=2**32 + 5, window_kind=window_kind, batch=(1, 1), dtype=BF16)
    check(operators.hybrid_attention, case)


TERRACE = {"window": 600, "window_kind": "terrace", "sink": 4}
FEW_HEADS = [
    (operators.hybrid_attention, Case("2w", packing="left", batch=(2, 1), dtype=BF16, **TERRACE)),
    (operators.linear_attention, Case("2048", batch=(1, 1), initial=True, dtype=BF16)),
]


@pytest.mark.parametrize(("call", "case"), FEW_HEADS, ids=name)
def test_segments_of_a_sequence_equal_the_reference(call, case):
    check(call, case)


def test_few_heads_are_divided_among_blocks():
    blocks = []

    def run(**arguments):
        names = (*emulated.INPUTS, "m", "den")
        blocks.append(emulated.planned("hybrid_attention", names, arguments).blocks)

    for heads in (1, 16, 64):
        x = make_inputs(Case("2048", batch=(1, heads), dtype=BF16))
        operators.hybrid_attention(Kernels(run), x.as_dtype(BF16, "plain"))
    assert blocks == [4, 64, 64]  # segments of at least 512 tokens, at most 108 blocks


PADDED = [
    (operators.hybrid_attention, Case(D=64, V=72, G=2, sink=4, window=48, dtype=BF16)),
    (operators.hybrid_attention, Case(D=60, sink=37, window_kind="terrace", dtype=BF16)),
    (operators.linear_attention, Case("500", D=64, initial=True, layout="strided", dtype=BF16)),
    (operators.hybrid_attention, Case(D=64, sink=4, window=48, activation="relu", dtype=FP16)),
]


@pytest.mark.parametrize(("call", "case"), PADDED, ids=name)
def test_padding_may_be_anywhere(call, case):
    case = replace(case, batch=(3, 1))
    x = make_inputs(case)
    real = torch.rand(3, case.T, generator=torch.Generator().manual_seed(1)) < 0.6
    real[2] = False
    x.sequences = {"key_padding_mask": real}
    kernels = Kernels(program(NARROW))
    got = call(kernels, x.as_dtype(case.dtype, case.layout))
    compare(got, call(lo.reference, x), case.dtype)
    padded = ~real[:, None].expand_as(kernels.saved.den)
    assert (kernels.saved.den[padded] == 1).all()


def test_tokens_after_the_last_sequence_get_zero():
    case = Case("3w+7", D=64, window=16, batch=(1, 1), dtype=BF16)
    x = make_inputs(case).as_dtype(BF16, "plain")
    run = program(NARROW)
    for bounds in ([0, 20], [0]):
        x.sequences = {"cu_seqlens": torch.tensor(bounds)}
        kernels, end = Kernels(run), bounds[-1]
        out = operators.hybrid_attention(kernels, x)["out"]
        assert out[:, :, :end].isfinite().all()
        assert (out[:, :, end:] == 0).all()
        assert (kernels.saved.den[:, :, end:] == 1).all()
        assert (kernels.saved.m[:, :, end:] == 0).all()


NARROW_HEADS = [
    (
        operators.hybrid_attention,
        Case(D=60, V=72, sink=4, window=48, batch=(1, 1), layout="strided", dtype=BF16),
    ),
    (
        operators.linear_attention,
        Case("500", D=64, V=72, batch=(1, 1), initial=True, packing="packed", dtype=BF16),
    ),
]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(("call", "case"), NARROW_HEADS, ids=name)
def test_no_access_is_out_of_bounds_or_races(call, case, sanitizer):
    check(call, case, ONE, sanitizer=sanitizer, order=3)


def test_tiles_that_are_loaded_ahead_and_sinks_in_the_place_of_features_do_not_race():
    case = Case("2w", D=128, f=64, window=600, sink=37, batch=(1, 1), dtype=BF16)  # in segments
    check(operators.hybrid_attention, case, ONE_WIDE, sanitizer="thread", order=3)


def test_no_access_of_fp32_is_out_of_bounds():
    case = Case(D=64, window=20, window_kind="terrace", sink=17, packing="left", dtype=FP32)
    check(operators.hybrid_attention, case, ONE_FP32, sanitizer="address")


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("D", [60, 64])  # number by number, and 16 bytes at a time
def test_no_access_of_fp16_is_out_of_bounds_or_races(D, sanitizer):
    case = Case(D=D, V=72, window=20, sink=17, activation="relu", packing="left", dtype=FP16)
    check(operators.hybrid_attention, case, ONE_FP16, sanitizer=sanitizer, order=3)


def test_warps_with_queries_and_warps_with_keys_do_not_race():
    case = Case(D=128, dtype=BF16, **SMALL_PADDED)
    check(operators.hybrid_attention, case, ONE_LARGE, sanitizer="thread", order=3)
