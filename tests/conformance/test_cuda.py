"""The CUDA kernels against the fp64 reference, built by g++ and run by the emulator, which fails on
barriers that not all threads reach, copies that nobody waits for and the like (gpu_on_cpu.cuda).

Arguments go through the C ABI's checks and the plan, as those of CUDA tensors do.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from gpu_on_cpu.cuda.program import KernelError
from helpers import emulated
from helpers.cases import Case, Inputs, cases, make_inputs
from helpers.compare import assert_close, assert_same_state
from helpers.operators import MAPS
from helpers.states import SETTINGS, arguments, case_of, empty_state, prepare, reference_of

import lolcats_ops as lo

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_TOKEN = [*range(21)]


def check_steps(x: Inputs, cuts: list[int], dtype: torch.dtype, slack: int = 0, **options) -> None:
    """Outputs and final state of calls between successive cuts, against one call in fp64."""
    wide = Inputs(x.case, {n: t.double() for n, t in x.leaves.items()}, {})
    final = empty_state(wide, slack)
    settings = {"affine": x.case.affine}
    want = lo.reference.hybrid_attention_step_(*arguments(wide), final, **settings)
    state = empty_state(x, slack)
    options |= {"cuts": cuts, **settings}
    out = emulated.hybrid_attention_step_(*arguments(x), state, **options)
    assert_close(f"out of cuts {cuts}", out, want, dtype)
    assert_same_state(state, final, torch.float32)


@pytest.mark.parametrize(("window", "kind", "sink", "slack"), SETTINGS, ids=str)
def test_steps_and_prefill_equal_one_call(window, kind, sink, slack):
    x = prepare(case_of(window, kind, sink), 30, torch.float32)
    check_steps(x, [0, 1, 2, 6, 14, 30], torch.float32, slack)


WIDE = [
    (Case(D=64, G=1, batch=(1, 2)), emulated.SMALL),
    (Case(D=64, G=3, batch=(2, 1), shared="k", window_kind="terrace", sink=1), emulated.SMALL),
    (Case(D=128, f=64, G=2, batch=(1, 1)), emulated.LARGE),
    (Case(D=128, G=4, batch=(1, 1), shared="q and k"), emulated.LARGE),
    (Case(D=64, V=72, G=1, batch=(1, 1)), emulated.LARGE),
]


@pytest.mark.parametrize(("case", "instances"), WIDE, ids=str)
def test_wide_heads_in_bf16(case, instances):
    x = prepare(case, 20, torch.bfloat16)
    check_steps(x, [*range(19), 20], torch.bfloat16, instances=instances)


MATRIX = cases(
    *("two_sided", "bias", "skip", "shared", "layout", "affine", "activation"),
    *("window_kind", "sink"),
    D=(12, 60), V=(21,), f=("D", 24), G=(1, 3), window=(0, 1, 5), batch=((1, 1), (1, 2)),
    dtype=(torch.float32, torch.bfloat16),
)  # fmt: skip


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_kind_of_map_and_window(case):
    x = prepare(case, 12, case.dtype)
    check_steps(x, [0, 7, 8, 9, 12], case.dtype, instances=emulated.UNALIGNED)


def test_keys_beyond_one_tile_of_shared_memory():
    x = prepare(Case(D=64, G=1, batch=(1, 1), window=150, sink=4), 200, torch.float32)
    check_steps(x, [0, 198, 199, 200], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pool_of_states_is_updated_where_indices_say(dtype):
    x = prepare(Case(D=16, V=24, f=24, G=2, window=5, sink=1, batch=(2, 2)), 20, dtype)
    want, final = reference_of(x)
    pool, slots = empty_state(x, batch=5), torch.tensor([3, 1], dtype=torch.int32)
    untouched = pool.clone()
    out = emulated.hybrid_attention_step_(
        *arguments(x), pool, cuts=EVERY_TOKEN, state_indices=slots
    )
    assert_close("out", out, want, dtype)
    assert_same_state(pool.select(slots.long()), final, torch.float32)
    others = torch.tensor([0, 2, 4])
    for name, got in pool.select(others).tensors.items():
        assert got.equal(untouched.select(others).tensors[name]) or got.isnan().all(), name


def check_decode(case: Case, lengths: tuple, slots: tuple, more: int, cuts: list[int]) -> None:
    """Sequences of some lengths, prefilled in one call and packed, then decoded on slots of a pool
    of four: ``more`` tokens, in calls between successive cuts. In bf16, against the full forward.
    """
    alone = [_tokens(case, n + more, seed=n) for n in lengths]
    for a in alone[1:]:  # one set of parameters
        a.leaves.update({n: t for n, t in alone[0].leaves.items() if t.ndim < 4})
    cut = list(zip(alone, lengths, strict=True))
    rows = ("q", "k", "v")
    packed = [torch.cat([a.leaves[r][:, :, :n] for a, n in cut], 2) for r in rows]
    tails = [torch.cat([a.leaves[r][:, :, n:] for a, n in cut]) for r in rows]
    state, indices = empty_state(alone[0], batch=4), torch.tensor(slots)
    parameters, options = arguments(alone[0])[3:], {"state_indices": indices}
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    emulated.hybrid_attention_step_(*packed, *parameters, state, cu_seqlens=bounds, **options)
    out = emulated.hybrid_attention_step_(*tails, *parameters, state, cuts=cuts, **options)
    for i, (x, n) in enumerate(cut):
        want, final = reference_of(x)
        assert_close(f"sequence {i}", out[i : i + 1], want[:, :, n:], torch.bfloat16)
        assert_same_state(state.select(indices[i : i + 1]), final, torch.float32)


@pytest.mark.parametrize("bounds", [[0, 2, 4], [0]])
def test_tokens_after_the_last_sequence_get_zero(bounds):
    x = prepare(Case(D=16, V=24, f=16, G=2, window=5, batch=(1, 2)), 6, torch.bfloat16)
    options = {"state_indices": torch.arange(len(bounds) - 1), "cu_seqlens": torch.tensor(bounds)}
    out = emulated.hybrid_attention_step_(*arguments(x), empty_state(x, batch=2), **options)
    assert out[:, :, : bounds[-1]].isfinite().all()
    assert (out[:, :, bounds[-1] :] == 0).all()


@pytest.mark.parametrize("affine", [False, True])
def test_a_gate_that_is_nan_makes_nan(affine):
    x = prepare(
        Case(D=16, V=24, f=16, G=2, window=4, batch=(1, 2), affine=affine), 20, torch.float32
    )
    x.leaves["gate"][0] = float("nan")
    out = emulated.hybrid_attention_step_(
        *arguments(x), empty_state(x), cuts=[0, 19, 20], affine=affine
    )
    assert out[:, 0].isnan().all()
    assert out[:, 1:].isfinite().all()


def _tokens(case: Case, length: int, seed: int) -> Inputs:
    inputs = make_inputs(replace(case, length="w", window=length), seed)
    leaves = inputs.as_dtype(torch.bfloat16, "transposed").leaves
    return Inputs(case, {n: t.detach() for n, t in leaves.items()}, {})


def test_packed_prefill_then_steps_on_permuted_slots():
    case = Case(D=16, V=24, f=16, G=2, window=8, sink=1, batch=(1, 2), shared="k")
    cuts = [0, *itertools.accumulate(random.Random(0).choices(range(1, 9), k=100))]
    more = 60
    cuts = [*(c for c in cuts if c < more), more]
    check_decode(case, (13, 0, 37), (2, 0, 1), more, cuts)


def test_4096_steps_in_bf16_equal_the_full_forward():
    case = Case(D=16, V=16, f=16, G=1, window=16, sink=1, batch=(1, 1))
    check_decode(case, (13, 37), (3, 1), 4096, [*range(4097)])


@pytest.mark.parametrize("kind", ["sliding", "terrace"])
def test_lazy_steps_only_read_the_sums_between_folds(kind):
    lazy, slack = 4, 6
    x = prepare(Case(D=16, G=1, window=4, window_kind=kind, batch=(1, 1)), 40, torch.float32)
    want, _ = reference_of(x)
    state, outs, written = empty_state(x, slack), [], 0
    for i in range(40):
        before = state.clone()
        new = arguments(x, i, i + 1)
        outs.append(emulated.hybrid_attention_step_(*new, state, lazy=lazy))
        folds = state.folded.item() > before.folded.item()
        assert folds or (state.kv.equal(before.kv) and state.ksum.equal(before.ksum))
        assert state.length.item() - state.folded.item() <= state.ring
        assert state.folded.item() <= max(0, i + 1 - (slack - lazy) - 4)  # can be taken back
        written += folds
    assert written <= 1 + 40 // (lazy + 1)
    assert_close("out", torch.cat(outs, 2), want, torch.float32)


# Without sharing: the last of a sequence's blocks overwrites the ring that the others read.
RACY = Case(D=16, V=24, f=16, G=2, window=3, sink=1, batch=(2, 1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_steps_are_clean_in_any_order(sanitizer, order):
    x = prepare(RACY, 9, torch.float32)
    options = {"instances": emulated.ONE, "sanitizer": sanitizer, "order": order}
    check_steps(x, [0, 1, 2, 6, 9], torch.float32, slack=1, **options)


def test_a_mask_is_refused_with_what_would_do():
    x = prepare(RACY, 3, torch.float32)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(KernelError, match="key_padding_mask is not for the CUDA kernels: pack"):
        emulated.hybrid_attention_step_(*arguments(x), empty_state(x), key_padding_mask=mask)


FEATURES = cases(
    *MAPS, "activation",
    D=(16, 60, 128), f=("D", 24), length=("0", "1", "3w+7"), batch=((1, 1), (2, 1)), window=(16,),
)  # fmt: skip


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_feature_map_equals_the_reference(case):
    wide, x = (
        make_inputs(case).as_dtype(dtype, layout)
        for dtype, layout in ((torch.float64, "plain"), (case.dtype, case.layout))
    )
    with torch.no_grad():
        want = lo.reference.feature_map(wide.leaves["q"], wide.features("q"))
        got = emulated.feature_map(x.leaves["q"], x.features("q"))
    assert_close("y", got, want, case.dtype, floor=1e-3)
