"""The Triton kernels in the interpreter: bounds are checked in every launch (gpu_on_cpu)."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from helpers.kernels import INTERPRETED

if not INTERPRETED:
    pytest.skip("TRITON_INTERPRET=0: nothing is interpreted", allow_module_level=True)

from gpu_on_cpu import sanitizer
from helpers.cases import FACTORS, Case, cases, make_inputs
from helpers.compare import assert_close, assert_same_state
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
    feature_map,
    hybrid_attention,
    linear_attention,
)
from helpers.states import SETTINGS, arguments, case_of, empty_state, feed, prepare, reference_of
from lolcats_ops.kernels.triton import launch
from lolcats_ops.kernels.triton.attention_transfer import real_queries

import lolcats_ops as lo
from lolcats_ops.ops.hybrid_attention_step import step_

pytestmark = pytest.mark.usefixtures("one_thread")

# Small enough to be interpreted; windows below, between and above the tiles of 16 to 64 tokens.
SMALL = {
    "D": (16, 60),
    "V": ("D", 20, 72),
    "f": ("D", 24),
    "G": (1, 3),
    "batch": ((1, 1), (2, 1), (1, 2)),
    "window": (0, 1, 16, 48, 100),
    "length": ("0", "1", "w-1", "w+1", "2w", "3w+7"),
}


def small(*factors: str, **others: tuple) -> pytest.MarkDecorator:
    names = {n: FACTORS[n] for n in factors} | {n: v for n, v in SMALL.items() if n in factors}
    selected = cases(**names | others)
    return pytest.mark.parametrize("case", selected, ids=map(str, selected))


@small(*MAPS, "activation", length=("0", "1", "3w+7"))
def test_feature_map_equals_the_reference(case):
    check(feature_map, case, "triton")


@small(*MAPS, *SEQUENCES, "normalize", "initial", activation=(*FACTORS["activation"], None))
def test_linear_attention_equals_the_reference(case):
    check(linear_attention, case, "triton")


@small(*HYBRID)
def test_hybrid_attention_equals_the_reference(case):
    check(hybrid_attention, case, "triton")


@small(*HYBRID, "xent")
def test_attention_transfer_equals_the_reference(case):
    check_transfer(case, "triton")


@pytest.mark.parametrize("case", LINEAR_KEYS, ids=str)
def test_attention_transfer_has_gradients_of_linear_keys(case):
    check_transfer(case, "triton")


LARGE = [
    Case("w+1", D=128, f=64, window=64, batch=(1, 1)),
    Case("w+1", D=256, f=128, V=72, window=16, batch=(1, 1), bias=True),
    Case("w+1", D=96, f=256, window=16, batch=(1, 1), activation="exp"),
    Case("w+1", D=128, window=64, window_kind="terrace", skip=True, batch=(1, 1)),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_wide_heads_and_features_equal_the_reference(case):
    check(hybrid_attention, case, "triton")


@pytest.mark.parametrize(
    ("call", "activation"),
    [
        (linear_attention, "relu"),
        (hybrid_attention, "relu"),
        (attention_transfer, "relu"),
        (attention_transfer, "exp"),
    ],
)
def test_gradients_see_weights_that_bf16_does_not_hold(call, activation):
    maps = {"activation": activation, "two_sided": False, "f": 64}
    case = Case("3w+7", D=64, batch=(1, 2), **maps, trained=True, dtype=torch.bfloat16)
    check(call, case, "triton")


@pytest.mark.parametrize(("spread", "window"), [(3.0, 0), (6.0, 0), (6.0, 16)])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128)])  # resident maps, others
def test_maps_that_spread_z_keep_bf16_exact(sizes, spread, window):
    check_spread(partial(lo.hybrid_attention, backend="triton"), spread, sizes, window=window)


@pytest.mark.parametrize("window", [16, 64])
def test_gradients_of_keys_that_have_much_in_common(window):
    attention = partial(lo.hybrid_attention, backend="triton")
    check_spread(attention, 1.0, (64, 64), mean=12.0, window=window, sink=3)


@pytest.mark.parametrize("call", [linear_attention, hybrid_attention])
def test_gradients_keep_their_digits_however_long_a_sequence_is(call):
    """kv is rounded less the mean of its values: by that of the first chunk, they lost a half."""
    case = Case("2048", D=16, f=16, window=16, batch=(1, 1), dtype=torch.bfloat16)
    check(call, case, "triton", factor=1.2)


SEGMENTED = [
    Case("1000", window=16, batch=(1, 1), sink=1),
    Case("1000", window=16, batch=(1, 1), window_kind="terrace", affine=True),
    Case("1000", window=256, batch=(1, 1), packing="packed"),
    # Backward carries two tiles, and three of which the last is weighed in turns.
    Case("1000", window=48, batch=(1, 1), sink=1, dtype=torch.bfloat16),
    Case("1000", window=64, batch=(1, 1), sink=1, window_kind="terrace", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_sequences_cut_into_segments_equal_the_reference(case):
    check(hybrid_attention, case, "triton")


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("call", [hybrid_attention, attention_transfer])
@pytest.mark.parametrize("packing", [None, "left"])
def test_results_do_not_depend_on_the_default_dtype(default, call, packing):
    case = Case("3w+7", window=16, packing=packing)
    inputs = make_inputs(case).as_dtype(case.dtype, case.layout)

    def results():
        outputs = call(lo, inputs, backend="triton")
        total = sum(y.sum() for y in outputs.values() if y.requires_grad)
        leaves = list(inputs.leaves.values())
        return *outputs.values(), *torch.autograd.grad(total, leaves, allow_unused=True)

    want = results()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("programs", [1, 8, 32, 263, 264, 5000])
@pytest.mark.parametrize("chunks", [0, 1, 16, 17, 1000, 10**6])
def test_segments_are_as_many_as_make_work_and_no_more(programs, chunks):
    length = launch.segment_chunks(chunks, programs)
    count = max(1, -(-chunks // length))
    assert count * programs <= max(launch.MOST_PROGRAMS, programs)
    assert count == 1 or length >= launch.SEGMENT_CHUNKS
    if programs < launch.ENOUGH_PROGRAMS and chunks >= launch.SEGMENT_CHUNKS * launch.MOST_PROGRAMS:
        assert count * programs >= launch.ENOUGH_PROGRAMS


@pytest.mark.parametrize(("window", "kind"), [(96, "sliding"), (65, "sliding"), (64, "terrace")])
@pytest.mark.parametrize("packing", ["left", "packed"])
def test_tiles_are_carried_as_far_as_the_launch_configuration_says(
    window, kind, packing, monkeypatch
):
    """Forward, too, which carries one tile at most in those of the table."""
    settings = {"window": window, "window_kind": kind, "packing": packing, "batch": (1, 2)}
    case = Case("3w+7", **settings, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "_tiles", lambda *_: launch.Tiles(32, 64, 4, 1, carried=3))
    check(hybrid_attention, case, "triton")


@pytest.mark.parametrize(("window", "kind", "sink", "slack"), SETTINGS, ids=str)
def test_steps_and_prefill_equal_one_call(window, kind, sink, slack):
    x = prepare(case_of(window, kind, sink), 30, torch.float32)
    want, final = reference_of(x, slack)
    for cuts in ([0, 30], [0, 1, 2, 6, 17, 30]):
        state = empty_state(x, slack)
        with sanitizer.checked(races=True, order=len(cuts)):
            out = feed(x, state, cuts, backend="triton")
        assert_close(f"out of cuts {cuts}", out, want, torch.float32)
        assert_same_state(state, final, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pool_of_states_is_updated_where_indices_say(dtype):
    x = prepare(case_of(3, "sliding", 1, batch=(2, 2), affine=True), 20, dtype)
    want, final = reference_of(x)
    pool, slots = empty_state(x, batch=5), torch.tensor([3, 1])
    untouched = pool.clone()
    out = feed(x, pool, [0, 1, 9, 12, 20], state_indices=slots, backend="triton")
    assert_close("out", out, want, dtype)
    assert_same_state(pool.select(slots), final, dtype)
    others = torch.tensor([0, 2, 4])
    for name, got in pool.select(others).tensors.items():
        assert got.equal(untouched.select(others).tensors[name]) or got.isnan().all(), name


@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_sequences_whose_slots_do_not_exist_are_skipped(tokens, monkeypatch):
    """The CPU's kernels refuse such slots."""
    monkeypatch.setattr("lolcats_ops.kernels.triton.launch.SEGMENT_CHUNKS", 2)
    x = prepare(case_of(3, "sliding", 1, batch=(3, 2)), tokens, torch.float32)
    pool, slots = empty_state(x, batch=2), torch.tensor([-1, 1, 2])
    want = pool.clone()
    with sanitizer.checked(races=True):
        out = step_("triton", *arguments(x), pool, state_indices=slots, scale=None, affine=False)
    q, k, v, *others = arguments(x)
    alone = (q[1:2], k[1:2], v[1:2], *others)
    own = lo.hybrid_attention_step_(*alone, want, state_indices=slots[1:2], backend="triton")
    assert out[1:2].equal(own)
    for name, got in pool.tensors.items():
        torch.testing.assert_close(got, want.tensors[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("seed", "window"), [(5, 16), (6, 16), (5, 0)])
def test_the_gates_gradient_does_not_see_that_y_is_rounded(seed, window):
    check_gate(seed, (1, 2, 100, 32), "triton", "cpu", window=window)


@pytest.mark.parametrize(("call", "settings"), BOUNDLESS)
def test_windows_sinks_and_gates_have_no_bounds(call, settings):
    check(call, Case("500", batch=(1, 1), **settings), "triton")


def attended(**changes):
    """hybrid_attention of 40 tokens, its inputs and options ``changes``."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=rng)
    inputs = {"q": q, "k": k, "v": v, "gate": torch.zeros(2), "window": 4} | changes
    maps = lo.Features(torch.eye(16).repeat(2, 1, 1))
    return lo.hybrid_attention(feature_q=maps, feature_k=maps, **inputs, backend="triton")


def test_indices_may_be_slices_and_states_may_not():
    bounds = torch.tensor([0, 3, 7, 20, 40], dtype=torch.int32)
    strided = torch.stack((bounds, bounds + 50), 1)[:, 0]
    assert not strided.is_contiguous()
    assert attended(cu_seqlens=strided).equal(attended(cu_seqlens=bounds))
    x = prepare(case_of(3, "sliding", 1, batch=(2, 2)), 20, torch.float32)
    want, _ = reference_of(x)
    slots = torch.tensor([4, 0, 2, 0])[::2]
    out = feed(x, empty_state(x, batch=5), [0, 9, 20], state_indices=slots, backend="triton")
    assert_close("out", out, want, torch.float32)
    state = empty_state(x)
    state = replace(state, kv=torch.stack((state.kv, state.kv), 1)[:, 0])
    with pytest.raises(ValueError, match=r"state.kv must be contiguous"):
        feed(x, state, [0, 20], backend="triton")


def test_rows_too_far_apart_are_refused():
    far = torch.empty(2**25, dtype=torch.bfloat16).as_strided((1, 2, 2, 16), (0, 16, 2**24 + 1, 1))
    with pytest.raises(ValueError, match=r"at most 16777216 between tokens"):
        attended(q=far, k=far, v=far)
    # Sinks are one tile, here of 512.
    far = torch.empty_strided((1, 2, 300, 16), (0, 0, 2**22 + 1, 1), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"at most 4194304 between tokens"):
        attended(q=far, k=far, v=far, sink=300)


def test_losses_divide_by_more_numbers_than_32_bits_count():
    q, bounds = torch.empty(1, 32, 2**19, 128, device="meta"), torch.tensor([0, 2**19])
    assert real_queries(q, bounds.int(), None) * 128 == 2**31


def test_no_sequences_have_gradients():
    empty = torch.zeros(0, 2, 5, 16, requires_grad=True)
    gate = torch.zeros(2, requires_grad=True)
    attended(q=empty, k=empty, v=empty, gate=gate).sum().backward()
    assert gate.grad.tolist() == [0, 0]


def test_nan_stays_nan():
    x = torch.zeros(1, 2, 20, 16)
    x[0, 0, 10] = float("nan")
    phi = lo.feature_map(x, lo.Features(torch.eye(16).repeat(2, 1, 1)), backend="triton")
    assert phi.isnan().all(-1).nonzero().tolist() == [[0, 0, 10]]
    assert phi.isnan().sum() == phi.shape[-1]


@pytest.mark.parametrize("affine", [False, True])
def test_a_gate_that_is_nan_makes_nan(affine, monkeypatch):
    """As the values of a GPU's tensors are not looked at."""
    monkeypatch.setattr("lolcats_ops.ops.validation.is_readable", lambda x: False)
    x = prepare(case_of(4, "sliding", 0, affine=affine), 20, torch.float32)
    x.leaves["gate"][0] = float("nan")
    options = {"affine": affine, "backend": "triton"}
    out = lo.hybrid_attention(*arguments(x), **x.case.windows, **options)
    stepped = feed(x, empty_state(x), [0, 19, 20], **options)
    for y in (out, stepped):
        assert y[:, 0].isnan().all()
        assert y[:, 1:].isfinite().all()


def test_feature_map_takes_any_number_of_heads():
    from lolcats_ops.kernels.triton.feature_map import maps_of

    x = torch.zeros(1 << 12, 17, 1, 4)  # 69 632, while a grid is 65 535 high
    grid = maps_of(x, torch.zeros(17, 4, 4), None, (0, True, False, 0.0), "feature_map", 1)[1]
    assert grid == (x.shape[0] * x.shape[1],)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("call", "case"),
    [
        (hybrid_attention, Case("3w+7", V=72, G=3, sink=1, packing="left", affine=True)),
        (hybrid_attention, Case("500", V=72, window=64, batch=(1, 2), packing="packed")),
        (linear_attention, Case("500", G=2, shared="k", initial=True, batch=(1, 1))),
        (feature_map, Case("500", G=2, bias=True, shared="q and k")),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_programs_neither_race_nor_depend_on_their_order(call, case, order):
    with sanitizer.checked(races=True, order=order):
        check(call, case, "triton")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [1, 4, 37])
def test_no_segment_touches_the_sums_before_it(count, reverse):
    """Not by what it adds, large or infinite as it may be."""
    from lolcats_ops.kernels.triton.forward import exclusive_sums

    kv, ksum = torch.ones(2, count, 40), torch.ones(2, count, 20)
    for x in (kv, ksum):
        x[0, count // 2], x[1, -1] = 1e8, float("inf")
    kv0 = torch.tensor([[2.0], [3.0]]).expand(2, 40).contiguous()
    ordered = [(x.flip(1) if reverse else x).double() for x in (kv, ksum)]
    exclusive_sums[(3 + 2, 2)](kv, ksum, kv0, None, 40, 20, count, reverse, 16, 16)
    for x, rows, initial in zip((kv, ksum), ordered, (kv0, torch.zeros(2, 20)), strict=True):
        want = rows.cumsum(1).roll(1, 1)
        want[:, 0] = 0
        want += initial[:, None]
        got = x.flip(1) if reverse else x
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
