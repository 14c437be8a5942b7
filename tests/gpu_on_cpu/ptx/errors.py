"""What can go wrong."""

from __future__ import annotations


class PtxError(RuntimeError):
    """The PTX, or the call, makes no sense."""


class NotSupported(PtxError):
    """An instruction, or a use of one, that this package does not know."""

    def __init__(self, what: str):
        super().__init__(f"not supported: {what}")


class Fault(RuntimeError):
    """The kernel did what ends it on a GPU, too: out of bounds, misaligned, deadlock."""
