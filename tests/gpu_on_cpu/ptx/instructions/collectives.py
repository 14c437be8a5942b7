"""Control flow, and what the lanes of a warp do together: shuffles, votes, matrix products."""

from __future__ import annotations

import re

from ..errors import NotSupported
from ..parser import Statement, vector
from .encoding import Encoding, Typed, modifiers_of, rule, typed, unsigned
from .memory import address_of

_COLLECTIVE = {"sync", "aligned"}  # what all of them are


@rule("bra")
def _branch(s: Statement) -> Encoding:
    return Encoding("bra", target=s.operands[0])


@rule("ret", "exit")
def _exit(s: Statement) -> Encoding:
    return Encoding("exit")


@rule("trap")
def _trap(s: Statement) -> Encoding:
    return Encoding("trap")


Operands = tuple[Typed, ...]


def _collective(
    mask: str, operation: str, destinations: Operands, sources: Operands, extra: int = 0
) -> Encoding:
    """An operation that waits for the lanes of a mask, its last source."""
    sources = (*sources, Typed(mask, "u32"))
    immediates = (0, len(destinations) + len(sources) - 1, extra)
    return Encoding(operation, destinations, sources, immediates)


# Immediates of operations for which every lane has to come: their mask, and no operand that has it.
_WHOLE_WARP = (-1, -1)


@rule("bar", "barrier")
def _barrier(s: Statement) -> Encoding:
    parts = modifiers_of(s, ("aligned", "cta"))
    if parts == ["warp", "sync"]:
        return _collective(s.operands[0], "bar.warp.sync", (), ())
    if parts != ["sync"]:
        raise NotSupported(str(s))
    barrier, count = [*s.operands, "0"][:2]
    return Encoding("bar.sync", (), typed([barrier, count], "u32"), _WHOLE_WARP)


@rule("shfl")
def _shuffle(s: Statement) -> Encoding:
    mode, _ = modifiers_of(s, _COLLECTIVE)
    d, a, b, c, mask = s.operands
    value, inside = [*d.split("|"), "_"][:2]
    destinations = (Typed(value, "u32"), Typed(inside, "pred"))
    return _collective(mask, f"shfl.{mode}", destinations, typed([a, b, c], "u32"))


@rule("vote")
def _vote(s: Statement) -> Encoding:
    mode, type = modifiers_of(s, _COLLECTIVE)
    d, p, mask = s.operands
    destinations = (Typed(d, "u32" if type == "b32" else "pred"),)
    sources = (Typed(p.lstrip("!"), "pred"),)
    return _collective(mask, f"vote.{mode}", destinations, sources, p.startswith("!"))


@rule("redux")
def _reduce(s: Statement) -> Encoding:
    operation, type = modifiers_of(s, _COLLECTIVE)
    if operation not in ("min", "max"):
        type = unsigned(type)
    d, a, mask = s.operands
    return _collective(mask, f"redux.{operation}.{type}", typed([d], type), typed([a], type))


@rule("activemask")
def _active_mask(s: Statement) -> Encoding:
    return Encoding("activemask", typed(s.operands, "u32"))


@rule("mma")
def _mma(s: Statement) -> Encoding:
    shape, *rest = modifiers_of(s, _COLLECTIVE)
    rows, columns, *types = rest
    if (rows, columns) != ("row", "col") or types[0] != "f32" or types[3] != "f32":
        raise NotSupported(str(s))
    d, *sources = s.operands
    registers = [register for source in sources for register in vector(source)]
    return Encoding(
        f"mma.{shape}.{types[1]}", typed(vector(d), "b32"), typed(registers, "b32"), _WHOLE_WARP
    )


@rule("ldmatrix", "stmatrix")
def _matrix(s: Statement) -> Encoding:
    parts = [p.split("::")[0] for p in modifiers_of(s, _COLLECTIVE)]
    if parts[0] != "m8n8" or parts[-1] != "b16" or "shared" not in parts:
        raise NotSupported(str(s))
    operation = s.parts[0] + (".trans" if "trans" in parts else "")
    if s.parts[0] == "ldmatrix":
        registers, address = s.operands
        base, offset = address_of(address)
        results = typed(vector(registers), "b32")
        return Encoding(operation, results, (Typed(base, "address"),), (*_WHOLE_WARP, offset))
    address, registers = s.operands
    base, offset = address_of(address)
    sources = (Typed(base, "address"), *typed(vector(registers), "b32"))
    return Encoding(operation, (), sources, (*_WHOLE_WARP, offset))


@rule("wgmma")
def _wgmma(s: Statement) -> Encoding:
    operation, *rest = modifiers_of(s, _COLLECTIVE)
    if operation == "fence":
        return Encoding("nothing")
    if operation == "commit_group":
        return Encoding("wgmma.commit_group", immediates=_WHOLE_WARP)
    if operation == "wait_group":
        return Encoding("wgmma.wait_group", immediates=(*_WHOLE_WARP, int(s.operands[0], 0)))
    shape, result, a_type, _ = rest
    match = re.fullmatch(r"m64n(\d+)k(\d+)", shape)
    if operation != "mma_async" or not match or result != "f32":
        raise NotSupported(str(s))
    return _mma_async(s, f"wgmma.mma_async.k{match[2]}.{a_type}", a_type)


def _mma_async(s: Statement, operation: str, type: str) -> Encoding:
    d, a, b, adds, *scales = s.operands
    in_registers = a.startswith("{")
    negates = [int(scale) < 0 for scale in scales[:2]]
    transposed = [int(flag) for flag in scales[2:]]
    if in_registers:
        transposed = [0, *transposed]
    transposed = [*transposed, 0, 0][:2]
    flags = (*negates, *transposed, in_registers)
    left = typed(vector(a), "b32") if in_registers else (Typed(a, "b64"),)
    accumulators = typed(vector(d), "b32")
    return Encoding(
        operation,
        accumulators,
        (*left, Typed(b, "b64"), Typed(adds, "pred"), *accumulators),
        (*_WHOLE_WARP, sum(bool(flag) << bit for bit, flag in enumerate(flags))),
    )
