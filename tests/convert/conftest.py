"""A converted model."""

import pytest
from helpers.training import NARROW, tiny

import lolcats_ops as lo


@pytest.fixture
def model():
    return lo.hf.convert(tiny(), NARROW)
