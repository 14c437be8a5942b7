"""Every implementation of the operators that this machine can run."""

from importlib.util import find_spec

from lolcats_ops import _C

KERNELS = tuple(f"cpu:{isa}" for isa in _C.cpu_isas())
INTERPRETED = ("triton",) if find_spec("triton") else ()
ALL = (*KERNELS, "reference")
