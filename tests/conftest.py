"""Puts this directory on the path, so that tests can import ``helpers``; fixtures for all tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Triton decides when a kernel is decorated whether it is interpreted, its own library included.
os.environ.setdefault("TRITON_INTERPRET", "1")

# What hypothesis draws: the same in every run, or thousands with --hypothesis-profile=campaign. A
# fixture's instruction set is that of all draws, and how long one takes is the machine's affair.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": (HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
}
settings.register_profile("repeatable", max_examples=30, derandomize=True, **_COMMON)
settings.register_profile("campaign", max_examples=3000, print_blob=True, **_COMMON)
settings.load_profile("repeatable")


@pytest.fixture
def one_thread():
    """For thousands of tiny calls, in which threads would mostly wait for each other."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
