"""Puts this directory on the path, so that tests can import ``helpers``; fixtures for all tests."""

import os

import pytest

# Triton decides when a kernel is decorated whether it is interpreted, its own library included.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread():
    """For thousands of tiny calls, in which threads would mostly wait for each other."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
