"""Arithmetic, moves, conversions, comparisons."""

from __future__ import annotations

from ..errors import NotSupported
from ..parser import TYPE_BYTES, Statement, vector
from .encoding import Encoding, Typed, modifiers_of, rule, typed, unsigned

# Rounding to nearest is what C++ does; approximations are computed exactly.
_ROUNDING = {"rn", "approx", "full"}


# Signed and unsigned are the same.
_WRAPPING = {"add", "sub", "mul.lo", "mad.lo", "neg", "and", "or", "xor", "not", "cnot"}
_WRAPPING |= {"popc", "clz", "brev", "lop3", "prmt"}
# Flushing subnormal numbers changes nothing that a test can see.
_NO_FLUSH = {"min", "max", "neg", "abs", "tanh"}


@rule("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "and", "or")
@rule("xor", "not", "cnot", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "popc")
@rule("clz", "brev", "lop3", "prmt")
def _arithmetic(s: Statement) -> Encoding:
    *modifiers, type = modifiers_of(s, _ROUNDING)
    flush = "ftz" in modifiers and type == "f32" and s.parts[0] not in _NO_FLUSH
    operation = ".".join([s.parts[0], *(m for m in modifiers if m != "ftz")])
    if operation == "mad" and type in ("f32", "f64"):
        operation = "fma"
    if operation in _WRAPPING:
        type = unsigned(type)
    result, sources = _operand_types(operation, type, s.operands[1:])
    name = f"{operation}.{'ftz.' if flush else ''}{type}"
    return Encoding(name, (Typed(s.operands[0], result),), sources)


def _operand_types(operation: str, type: str, sources: tuple[str, ...]):
    if operation in ("mul.wide", "mad.wide"):
        wide = type[0] + str(16 * TYPE_BYTES[type])
        return wide, typed(sources[:2], type) + typed(sources[2:], wide)
    result = "u32" if operation in ("popc", "clz") else type
    return result, typed(sources, type)


@rule("shl", "shr")
def _shift(s: Statement) -> Encoding:
    (type,) = modifiers_of(s)
    if s.parts[0] == "shl" or type[0] == "b":
        type = unsigned(type)
    d, a, n = s.operands
    return Encoding(f"{s.parts[0]}.{type}", typed([d], type), (Typed(a, type), Typed(n, "u32")))


@rule("shf")
def _funnel_shift(s: Statement) -> Encoding:
    direction, mode, _ = modifiers_of(s)
    return Encoding(
        f"shf.{direction}.{mode}", typed(s.operands[:1], "u32"), typed(s.operands[1:], "u32")
    )


@rule("bfe")
def _extract_bits(s: Statement) -> Encoding:
    (type,) = modifiers_of(s)
    d, a, *bits = s.operands
    return Encoding(f"bfe.{type}", typed([d], type), (Typed(a, type), *typed(bits, "u32")))


@rule("bfi")
def _insert_bits(s: Statement) -> Encoding:
    type = unsigned(modifiers_of(s)[0])
    d, a, b, *bits = s.operands
    return Encoding(f"bfi.{type}", typed([d], type), typed([a, b], type) + typed(bits, "u32"))


@rule("mov")
def _move(s: Statement) -> Encoding:
    (type,) = modifiers_of(s)
    d, a = s.operands
    if d.startswith("{") or a.startswith("{"):
        return _repack(type, vector(d), vector(a))
    if type != "pred":
        type = f"u{8 * TYPE_BYTES[type]}"
    return Encoding(f"mov.{type}", typed([d], type), typed([a], type))


def _repack(type: str, destinations: tuple[str, ...], sources: tuple[str, ...]) -> Encoding:
    bits = 8 * TYPE_BYTES[type]
    return Encoding(
        "pack" if len(destinations) == 1 else "unpack",
        typed(destinations, f"any b{bits // len(destinations)}"),
        typed(sources, f"any b{bits // len(sources)}"),
    )


@rule("cvta")
def _convert_address(s: Statement) -> Encoding:
    """Generic addresses are global ones; those of shared memory are far above them."""
    modifiers = [m.split("::")[0] for m in modifiers_of(s, ("u64",))]
    d, a = typed(s.operands, "u64")
    if modifiers[-1] == "global":
        return Encoding("mov.u64", (d,), (a,))
    if modifiers[-1] != "shared":
        raise NotSupported(str(s))
    operation = "sub.u64" if modifiers[0] == "to" else "add.u64"
    return Encoding(operation, (d,), (a, Typed(str(_SHARED_WINDOW), "u64")))


_SHARED_WINDOW = 0x7FFF_0000_0000_0000  # kSharedWindow of machine.h


@rule("cvt")
def _convert(s: Statement) -> Encoding:
    modifiers = modifiers_of(s, {"rn", "ftz"})
    types = [m for m in modifiers if m in TYPE_BYTES]
    rest = [m for m in modifiers if m not in TYPE_BYTES]
    if "pack" in s.parts or len(types) != 2:
        raise NotSupported(str(s))
    to, source = types
    integers = [t for t in types if t[0] in "us"]
    names = ["integer" if t in integers else t for t in types]
    if len(integers) == 2:
        names = ["integer"]
    return Encoding(
        ".".join(["cvt", *rest, *names]),
        typed(s.operands[:1], f"any {to}" if to in integers else to),
        typed(s.operands[1:], f"any {source}" if source in integers else source),
        (TYPE_BYTES[source], source[0] == "s", TYPE_BYTES[to], to[0] == "s"),
    )


_COMBINE = {"and": 0, "or": 1, "xor": 2}
_UNSIGNED_ORDER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@rule("setp")
def _compare(s: Statement) -> Encoding:
    comparison, *combine, type = modifiers_of(s, ("ftz",))
    comparison = _UNSIGNED_ORDER.get(comparison, comparison)
    if comparison in ("eq", "ne"):
        type = unsigned(type)
    d, a, b, *other = s.operands
    p, q = [*d.split("|"), "_"][:2]
    other = other[0] if other else "1"
    return Encoding(
        f"setp.{comparison}.{type}",
        typed([p, q], "pred"),
        (*typed([a, b], type), Typed(other.lstrip("!"), "pred")),
        (_COMBINE[combine[0]] if combine else 0, other.startswith("!")),
    )


@rule("selp")
def _select(s: Statement) -> Encoding:
    type = f"u{8 * TYPE_BYTES[modifiers_of(s)[0]]}"
    d, a, b, p = s.operands
    return Encoding(f"selp.{type}", typed([d], type), (*typed([a, b], type), Typed(p, "pred")))
