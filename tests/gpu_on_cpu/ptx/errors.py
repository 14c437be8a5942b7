"""What can go wrong."""

from __future__ import annotations

from collections.abc import Sequence


class PtxError(RuntimeError):
    """The PTX, or the call, makes no sense."""


class NotSupported(PtxError):
    """An instruction, or a use of one, that this package does not know."""

    def __init__(self, what: str):
        super().__init__(f"not supported: {what}")


class Fault(RuntimeError):
    """The kernel did what ends it on a GPU, too: out of bounds, misaligned, deadlock.

    findings: the hazards before, of which it may be a consequence.
    """

    def __init__(self, message: str, findings: Sequence[object] = ()):
        after = f" (after {len(findings)} hazards, first {findings[0]})" if findings else ""
        super().__init__(message + after)
        self.findings = list(findings)
