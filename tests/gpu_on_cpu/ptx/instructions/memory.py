"""Loads, stores, atomics, asynchronous copies, fences."""

from __future__ import annotations

import re

from ..errors import NotSupported
from ..parser import TYPE_BYTES, Statement, vector
from .encoding import REASONS, Encoding, Typed, modifiers_of, rule, typed, unsigned

# Blocks run one after another: every memory order, scope and cache is the same.
_MEMORY = {
    *("relaxed", "acquire", "release", "acq_rel", "weak", "volatile", "nc", "gpu", "cta", "sys"),
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "noftz", "level"),
    *("L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::no_allocate"),
    *("L1::evict_unchanged", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
    *("L2::evict_first", "L2::evict_last", "L2::evict_normal"),
}


def address_of(text: str) -> tuple[str, int]:
    """Base and offset of ``[base+offset]``."""
    match = re.fullmatch(r"\[\s*([^\s+\]]+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
    if not match:
        raise ValueError(text)
    return match[1], int(match[2] or "0", 0)


_SPACES = {"global", "shared", "param"}
_VECTORS = {"v2", "v4", "v8"}


def _space(s: Statement) -> str:
    spaces = [part.split("::")[0] for part in s.parts]
    return next((space for space in spaces if space in _SPACES), "generic")


def _without_space(s: Statement) -> list[str]:
    """What an opcode says besides where: operation and type, what is unknown included."""
    parts = modifiers_of(s, _MEMORY | _VECTORS)
    return [part for part in parts if part.split("::")[0] not in _SPACES]


def _memory_type(s: Statement, registers: str) -> str:
    type, *unknown = reversed(_without_space(s))
    if unknown or type not in TYPE_BYTES:
        raise NotSupported(str(s))
    count = next((int(part[1:]) for part in s.parts if part in _VECTORS), 1)
    if len(vector(registers)) != count:
        raise ValueError(registers)
    return type


@rule("ld")
def _load(s: Statement) -> Encoding:
    registers, address = s.operands[:2]
    space, type = _space(s), _memory_type(s, registers)
    base, offset = address_of(address)
    immediates = (TYPE_BYTES[type], offset, type[0] == "s")
    results = typed(vector(registers), f"any {type}")
    return Encoding(f"ld.{space}", results, (Typed(base, "address"),), immediates)


@rule("st")
def _store(s: Statement) -> Encoding:
    address, registers = s.operands[:2]
    space, type = _space(s), _memory_type(s, registers)
    base, offset = address_of(address)
    sources = (Typed(base, "address"), *typed(vector(registers), f"any {type}"))
    return Encoding(f"st.{space}", (), sources, (TYPE_BYTES[type], offset))


@rule("atom", "red")
def _atomic(s: Statement) -> Encoding:
    operation, type = _without_space(s)
    if operation not in ("min", "max"):
        type = unsigned(type)
    operands = s.operands if s.parts[0] == "atom" else ("_", *s.operands)
    results, address, values, *other = operands
    values = vector(values)
    results = ("_",) * len(values) if results == "_" else vector(results)
    base, offset = address_of(address)
    return Encoding(
        f"atom.{_space(s)}.{operation}.{type}",
        typed(results, type),
        (Typed(base, "address"), *typed([*values, *other], type)),
        (TYPE_BYTES[type], offset),
    )


@rule("cp")
def _copy(s: Statement) -> Encoding:
    parts = modifiers_of(s)
    if parts[0] != "async" or "bulk" in parts or "mbarrier" in parts:
        raise NotSupported(f"{s}{REASONS['mbarrier']}")
    if parts[1] == "commit_group":
        return Encoding("cp.async.commit_group")
    if parts[1] == "wait_group":
        return Encoding("cp.async.wait_group", immediates=(int(s.operands[0], 0),))
    if parts[1] == "wait_all":
        return Encoding("cp.async.wait_all")
    to, source, size, *read = s.operands
    (to, to_offset), (source, source_offset) = address_of(to), address_of(source)
    return Encoding(
        "cp.async",
        (),
        (Typed(to, "address"), Typed(source, "address"), Typed(read[0] if read else size, "u32")),
        (int(size, 0), to_offset, source_offset),
    )


@rule("fence", "membar")
def _fence(s: Statement) -> Encoding:
    if s.opcode.startswith("fence.proxy.async"):
        return Encoding("fence.proxy.async")
    if s.opcode.startswith("fence.proxy"):
        raise NotSupported(str(s))
    return Encoding("nothing")


@rule("prefetch", "prefetchu", "discard", "applypriority", "createpolicy")
@rule("nanosleep", "griddepcontrol", "setmaxnreg")
def _about_speed(s: Statement) -> Encoding:
    return Encoding("nothing")
