"""What bench says of GPUs that nothing has run on."""

import json

import pytest

from bench import gpu_model, gpu_model_page

CASES = [(target, case) for target, cases in gpu_model.model()["cases"].items() for case in cases]


@pytest.mark.parametrize(("target", "case"), CASES, ids=map(" ".join, CASES))
def test_intervals_hold_the_bandwidth_and_grow_with_the_work(target, case):
    pass_, kind, D = case.split()
    small, large = (
        gpu_model.interval(target, pass_, kind, int(D), rows=rows, tokens=1024) for rows in (8, 512)
    )
    bytes_per_row = sum(kernel["bytes"] for kernel in gpu_model.model()["cases"][target][case])
    moved = 512 * bytes_per_row * (1 if pass_ == "step" else 1024)
    assert moved / gpu_model.model()["targets"][target]["bandwidth"] <= large.low < large.high
    assert small.low == pytest.approx(large.low / 64)
    assert small.high <= large.high


def test_what_is_not_modelled_has_no_interval():
    assert gpu_model.interval("sm_90", "forward", "sliding", 96, rows=8, tokens=1024) is None


def test_the_page_is_that_of_the_model():
    assert gpu_model_page.PAGE.read_text() == gpu_model_page.page()
    assert json.loads(gpu_model.DATA.read_text())["label"] == gpu_model.LABEL
