"""Every implementation of the operators that this machine can run."""

from lolcats_ops import _C

KERNELS = tuple(f"cpu:{isa}" for isa in _C.cpu_isas())
ALL = (*KERNELS, "reference")
