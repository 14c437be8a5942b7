"""Runs compiled PTX on a CPU and checks what it does; see README.md."""

from .errors import Fault, NotSupported, PtxError
from .kernel import PtxKernel
from .memory import Struct
from .report import Access, Finding, Hazard, Report, Traffic

__all__ = [
    "Access",
    "Fault",
    "Finding",
    "Hazard",
    "NotSupported",
    "PtxError",
    "PtxKernel",
    "Report",
    "Struct",
    "Traffic",
]
