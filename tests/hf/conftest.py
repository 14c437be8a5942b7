"""A converted model and a prompt."""

import pytest
from helpers.tiny_models import NARROW, tiny, token_ids

import lolcats_ops as lo


@pytest.fixture
def prompt():
    return token_ids(2, 12)


@pytest.fixture
def model():
    return lo.hf.convert(tiny(), NARROW)
