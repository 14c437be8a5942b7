"""Backends, instruction sets and devices that the conformance tests run on, poisoned memory."""

import pytest
from helpers.kernels import GPU, INTERPRETED, skipped_where_refused
from helpers.poison import poisoned_memory

from lolcats_ops import _C

if INTERPRETED:
    from gpu_on_cpu import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items) -> None:
    """Marks what runs on a GPU, for ``-m gpu``."""
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") in GPU:
            item.add_marker("gpu")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The CUDA kernels are tried with everything that there is a test of."""
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if backend != "cuda":
        return (yield)
    with skipped_where_refused(backend):
        return (yield)


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


@pytest.fixture
def device(backend):
    """Where the tensors of a backend live."""
    return "cuda" if backend in GPU else "cpu"
