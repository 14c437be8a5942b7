"""Every implementation of the operators that this machine can run."""

import os
from importlib.util import find_spec

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
    and lo.backend_for("hybrid_attention", backend=name, device="cuda").backend
)
KERNELS = (*CPU, *GPU)
ALL = (*KERNELS, "reference")
