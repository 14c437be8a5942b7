"""Backends and instruction sets that the conformance tests run on, with poisoned memory."""

import pytest
from helpers.kernels import INTERPRETED
from helpers.poison import poisoned_memory

from lolcats_ops import _C

if INTERPRETED:
    from gpu_on_cpu import interpreter

    interpreter.install()


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield


@pytest.fixture
def backend(request):
    """The name of a backend; "cpu:avx2" is the CPU's kernels for that instruction set."""
    name, _, isa = request.param.partition(":")
    before = _C.cpu_isa()
    if isa:
        _C.set_cpu_isa(isa)
    yield name
    _C.set_cpu_isa(before)
