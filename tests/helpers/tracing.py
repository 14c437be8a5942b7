"""Where the tests of bench.ports and bench.cycles trace a program."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import ports
from lolcats_ops import _C


@contextmanager
def traceable() -> Iterator[tuple[Path, Path]]:
    """The tracer and the driver; skips without AVX2, and where tracing is not permitted."""
    if "avx2" not in _C.cpu_isas():
        pytest.skip("needs avx2")
    with ports.tracer() as trace, ports.driver("-DTRACED") as program:
        try:
            yield trace, program
        except RuntimeError as refused:
            if "PTRACE_TRACEME: Operation not permitted" in str(refused):
                pytest.skip("tracing is not permitted here")
            raise
