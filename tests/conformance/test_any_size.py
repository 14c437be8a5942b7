"""Sizes that nobody thought of: drawn, and made as small as they can be where a test fails.

CI draws the same ones every time; ``--hypothesis-profile=campaign`` draws thousands of others.
"""

import pytest
import torch
from helpers.cases import Case, is_possible
from helpers.compare import assert_close, assert_same_state
from helpers.kernels import CPU
from helpers.operators import (
    attention_transfer,
    check,
    feature_map,
    hybrid_attention,
    linear_attention,
)
from helpers.states import empty_state, feed, prepare, reference_of
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
on_cpu = pytest.mark.parametrize("backend", CPU, indirect=True)


def is_well_posed(case: Case) -> bool:
    """Roundings to bf16 average out in tensors, not in a few numbers; and gradients of a bias are
    small sums of large terms, in which they show where features are few. So are those that count
    where a skip makes z large. The cross-entropy of one token is 0."""
    exact = case.dtype is torch.float32
    f = case.D if case.f == "D" else int(case.f)
    sizes_do = exact or min(case.T, case.D, int(case.V), f) >= (64 if case.skip else 16)
    numbers_do = not (case.xent and case.T == 1) and (exact or not case.bias)
    return is_possible(vars(case)) and sizes_do and numbers_do


tokens = st.integers(0, 300)
widths = st.integers(1, 256)
CASES = st.builds(
    Case,
    length=tokens.map(str),
    D=widths,
    V=widths,
    f=st.just("D") | widths,
    G=st.integers(1, 4),
    batch=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    window=st.integers(0, 150),
    window_kind=st.sampled_from(["sliding", "terrace"]),
    sink=st.integers(0, 70),
    affine=st.booleans(),
    # Among millions of z some are so near to relu's 0, or to exp's maximum, that rounding decides
    # where a gradient goes: neither is drawn.
    activation=st.sampled_from(["softmax", "elu1", "favor"]),
    skip=st.booleans(),
    two_sided=st.booleans(),
    bias=st.booleans(),
    shared=st.sampled_from(["neither", "k", "q and k"]),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    packing=st.sampled_from([None, "left", "right", "packed"]),
    xent=st.booleans(),
    normalize=st.booleans(),
    trained=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
).filter(is_well_posed)


@on_cpu
@pytest.mark.parametrize(
    "call", [feature_map, linear_attention, hybrid_attention, attention_transfer]
)
@given(case=CASES)
def test_operators_of_any_size_equal_the_reference(call, backend, case):
    # Of one token, or one feature, the gradients of the maps vanish.
    check(call, case, backend, floor=0.1)


@on_cpu
@given(case=CASES, slack=st.integers(0, 9), data=st.data())
def test_states_of_any_size_are_the_same_however_a_sequence_is_cut(backend, case, slack, data):
    length = data.draw(st.integers(1, 200))
    cuts = data.draw(st.sets(st.integers(1, length)))
    x = prepare(case, length, case.dtype)
    want, final = reference_of(x, slack)
    state = empty_state(x, slack)
    outputs = feed(x, state, sorted({0, *cuts, length}), backend=backend)
    assert_close("out", outputs, want, case.dtype)
    if case.dtype is torch.float32:  # sums of bf16's products may nearly cancel
        assert_same_state(state, final, case.dtype)
