"""Every operator, forward and backward, on every backend, against the fp64 reference (SPEC 9)."""

import pytest
from helpers.cases import FACTORS, Case, cases
from helpers.kernels import ALL, KERNELS
from helpers.operators import (
    BOUNDLESS,
    HYBRID,
    MAPS,
    SEQUENCES,
    attention_transfer,
    check,
    check_gate,
    feature_map,
    hybrid_attention,
    linear_attention,
)


def matrix(*factors: str, **others: tuple) -> pytest.MarkDecorator:
    """All cases on all backends; the quadratic reference itself is spared the long ones."""
    pairs = [
        pytest.param(case, backend, id=f"{backend}-{case}")
        for case in cases(*factors, **others)
        for backend in ALL
        if backend != "reference" or case.T <= 128
    ]
    return pytest.mark.parametrize(("case", "backend"), pairs, indirect=["backend"])


@matrix(*MAPS, "activation", length=("0", "1", "3w+7"))
def test_feature_map_equals_the_reference(case, backend, device):
    check(feature_map, case, backend, device)


@matrix(*MAPS, *SEQUENCES, "normalize", "initial", activation=(*FACTORS["activation"], None))
def test_linear_attention_equals_the_reference(case, backend, device):
    check(linear_attention, case, backend, device)


@matrix(*HYBRID)
def test_hybrid_attention_equals_the_reference(case, backend, device):
    check(hybrid_attention, case, backend, device)


@matrix(*HYBRID, "xent")
def test_attention_transfer_equals_the_reference(case, backend, device):
    check(attention_transfer, case, backend, device)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", [{"window": 32}, {"window": 0}, {"window": 0, "sink": 4}])
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_the_gates_gradient_does_not_see_that_y_is_rounded(seed, settings, backend, device):
    check_gate(seed, (2, 4, 200, 64), backend, device, **settings)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize(
    ("call", "settings"),
    [*BOUNDLESS, (attention_transfer, {"window": 16, "sink": 2**40, "xent": True})],
)
def test_windows_sinks_and_gates_have_no_bounds(call, settings, backend, device):
    check(call, Case("500", batch=(1, 1), **settings), backend, device)
