"""The instructions: which operation of the machine each PTX instruction is, and on what.

A rule takes a statement apart and says so with an ``Encoding``. Rules are grouped by family and
registered by the first word of the opcode. Modifiers that change nothing here are listed, with the
reason; any other is an error, because ignoring it would test another program.
"""

from . import arithmetic, collectives, memory  # noqa: F401  registers the rules
from .encoding import Encoding, Typed, encode

__all__ = ["Encoding", "Typed", "encode"]
