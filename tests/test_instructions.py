"""The kernels stay within their budget of instructions: `python -m bench.instructions --update`."""

import pytest

from bench import instructions


@pytest.fixture(scope="module")
def counts():
    if reason := instructions.why_not():
        pytest.skip(reason)
    made_by, _ = instructions.load_budget()
    if made_by != instructions.built_by():
        pytest.skip(f"the budget is of {made_by}, the library of {instructions.built_by()}")
    return instructions.count_all()


@pytest.mark.parametrize("case", [str(case) for case in instructions.CASES])
def test_instructions_per_useful_flop_stay_within_the_budget(case, counts):
    budget = instructions.load_budget()[1][case]
    limit = instructions.SLACK * budget.instructions_per_flop
    assert counts[case].instructions_per_flop <= limit
    assert counts[case].allocations <= budget.allocations


def test_the_budget_covers_the_cases():
    assert list(instructions.load_budget()[1]) == [str(case) for case in instructions.CASES]
