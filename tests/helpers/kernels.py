"""Every implementation of the operators that this machine can run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

import lolcats_ops as lo
from lolcats_ops import _C

# Triton decides once per process: what is interpreted runs on CPU tensors.
_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

INTERPRETED = ("triton",) if _INTERPRETS and find_spec("triton") else ()
CPU = tuple(f"cpu:{isa}" for isa in _C.cpu_isas())
GPU = tuple(
    name
    for name in ("cuda", "triton")
    if torch.cuda.is_available()
    and not _INTERPRETS
    and lo.backend_for("hybrid_attention_step_", backend=name, device="cuda").backend
)
KERNELS = (*CPU, *GPU)
ALL = (*KERNELS, "reference")


@contextmanager
def skipped_where_refused(backend: str) -> Iterator[None]:
    """A test that asks ``backend`` for what it says that it has no kernels for is skipped."""
    try:
        yield
    except ValueError as error:
        if f"no backend for this case: {backend}: " in str(error):
            pytest.skip(str(error))
        raise
