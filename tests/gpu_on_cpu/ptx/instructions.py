"""The instructions: which operation of the machine each PTX instruction is, and on what.

A rule takes a statement apart and says so with an ``Encoding``. Rules are grouped by family and
registered by the first word of the opcode. Modifiers that change nothing here are listed, with the
reason; any other is an error, because ignoring it would test another program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import NotSupported, PtxError
from .parser import TYPE_BYTES, Statement, vector

# Rounding to nearest is what C++ does; approximations are computed exactly; blocks run one after
# another, so that every memory order, scope and cache is the same.
_ROUNDING = {"rn", "approx", "full"}
_MEMORY = {
    *("relaxed", "acquire", "release", "acq_rel", "weak", "volatile", "nc", "gpu", "cta", "sys"),
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "noftz", "level"),
    *("L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::no_allocate"),
    *("L1::evict_unchanged", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"),
    *("L2::evict_first", "L2::evict_last", "L2::evict_normal"),
}
_COLLECTIVE = {"sync", "aligned"}

ALL_LANES = -1  # the mask of a collective, as a signed number


@dataclass(frozen=True)
class Typed:
    """An operand as it is written, and the type to read it as.

    "any b16": a register of any width, or a constant of that type; "address": a base address;
    "parameter": the name of one.
    """

    text: str
    type: str


@dataclass(frozen=True)
class Encoding:
    """An operation of the machine and its operands."""

    operation: str
    destinations: tuple[Typed, ...] = ()
    sources: tuple[Typed, ...] = ()
    immediates: tuple[int, ...] = ()
    target: str = ""  # the label that immediate 0 stands for


Rule = Callable[[Statement], Encoding]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def encode(statement: Statement) -> Encoding:
    """What the machine has to do for a statement."""
    name = statement.parts[0]
    if name not in RULES:
        reason = _REASONS.get(name, "")
        raise NotSupported(f"{statement}{reason}")
    try:
        return RULES[name](statement)
    except (ValueError, IndexError, KeyError) as error:
        raise PtxError(f"not understood: {statement}") from error


_REASONS = {
    "mbarrier": ": kernels with tensor descriptors (TMA, mbarrier) do not run here",
    "call": ": calls of device functions (printf, assert) do not run here",
    "tcgen05": ": sm_100's tensor core does not run here",
}


def _modifiers(statement: Statement, ignored: Iterable[str] = ()) -> list[str]:
    """The opcode without its name and without what changes nothing."""
    return [part for part in statement.parts[1:] if part not in ignored]


def _typed(texts: Iterable[str], type: str) -> tuple[Typed, ...]:
    return tuple(Typed(text, type) for text in texts)


def _register_type(type: str) -> str:
    """The machine's name of a type whose signedness does not matter."""
    return "u" + type[1:] if re.fullmatch(r"[bus]\d+", type) else type


# ---------------------------------------------------------------------------- arithmetic

# Signed and unsigned are the same.
_WRAPPING = {"add", "sub", "mul.lo", "mad.lo", "neg", "and", "or", "xor", "not", "cnot"}
_WRAPPING |= {"popc", "clz", "brev", "lop3", "prmt"}
# Flushing subnormal numbers changes nothing that a test can see.
_NO_FLUSH = {"min", "max", "neg", "abs", "tanh"}


@rule("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "neg", "abs", "and", "or")
@rule("xor", "not", "cnot", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "popc")
@rule("clz", "brev", "lop3", "prmt")
def _arithmetic(s: Statement) -> Encoding:
    *modifiers, type = _modifiers(s, _ROUNDING)
    flush = "ftz" in modifiers and type == "f32" and s.parts[0] not in _NO_FLUSH
    operation = ".".join([s.parts[0], *(m for m in modifiers if m != "ftz")])
    if operation == "mad" and type in ("f32", "f64"):
        operation = "fma"
    if operation in _WRAPPING:
        type = _register_type(type)
    result, sources = _operand_types(operation, type, s.operands[1:])
    name = f"{operation}.{'ftz.' if flush else ''}{type}"
    return Encoding(name, (Typed(s.operands[0], result),), sources)


def _operand_types(operation: str, type: str, sources: tuple[str, ...]):
    if operation in ("mul.wide", "mad.wide"):
        wide = type[0] + str(16 * TYPE_BYTES[type])
        return wide, _typed(sources[:2], type) + _typed(sources[2:], wide)
    result = "u32" if operation in ("popc", "clz") else type
    return result, _typed(sources, type)


@rule("shl", "shr")
def _shift(s: Statement) -> Encoding:
    (type,) = _modifiers(s)
    if s.parts[0] == "shl" or type[0] == "b":
        type = _register_type(type)
    d, a, n = s.operands
    return Encoding(f"{s.parts[0]}.{type}", _typed([d], type), (Typed(a, type), Typed(n, "u32")))


@rule("shf")
def _funnel_shift(s: Statement) -> Encoding:
    direction, mode, _ = _modifiers(s)
    return Encoding(
        f"shf.{direction}.{mode}", _typed(s.operands[:1], "u32"), _typed(s.operands[1:], "u32")
    )


@rule("bfe")
def _extract_bits(s: Statement) -> Encoding:
    (type,) = _modifiers(s)
    d, a, *bits = s.operands
    return Encoding(f"bfe.{type}", _typed([d], type), (Typed(a, type), *_typed(bits, "u32")))


@rule("bfi")
def _insert_bits(s: Statement) -> Encoding:
    type = _register_type(_modifiers(s)[0])
    d, a, b, *bits = s.operands
    return Encoding(f"bfi.{type}", _typed([d], type), _typed([a, b], type) + _typed(bits, "u32"))


# ---------------------------------------------------------------------------- moves, conversions


@rule("mov")
def _move(s: Statement) -> Encoding:
    (type,) = _modifiers(s)
    d, a = s.operands
    if d.startswith("{") or a.startswith("{"):
        return _repack(type, vector(d), vector(a))
    if type != "pred":
        type = f"u{8 * TYPE_BYTES[type]}"
    return Encoding(f"mov.{type}", _typed([d], type), _typed([a], type))


def _repack(type: str, destinations: tuple[str, ...], sources: tuple[str, ...]) -> Encoding:
    bits = 8 * TYPE_BYTES[type]
    return Encoding(
        "pack" if len(destinations) == 1 else "unpack",
        _typed(destinations, f"any b{bits // len(destinations)}"),
        _typed(sources, f"any b{bits // len(sources)}"),
    )


@rule("cvta")
def _convert_address(s: Statement) -> Encoding:
    """Generic addresses are global ones; those of shared memory are far above them."""
    modifiers = [m.split("::")[0] for m in _modifiers(s, ("u64",))]
    d, a = _typed(s.operands, "u64")
    if modifiers[-1] == "global":
        return Encoding("mov.u64", (d,), (a,))
    if modifiers[-1] != "shared":
        raise NotSupported(str(s))
    operation = "sub.u64" if modifiers[0] == "to" else "add.u64"
    return Encoding(operation, (d,), (a, Typed(str(SHARED_WINDOW), "u64")))


SHARED_WINDOW = 0x7FFF_0000_0000_0000  # kSharedWindow of machine.h


@rule("cvt")
def _convert(s: Statement) -> Encoding:
    modifiers = _modifiers(s, {"rn", "ftz"})
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
        _typed(s.operands[:1], f"any {to}" if to in integers else to),
        _typed(s.operands[1:], f"any {source}" if source in integers else source),
        (TYPE_BYTES[source], source[0] == "s", TYPE_BYTES[to], to[0] == "s"),
    )


# ---------------------------------------------------------------------------- predicates

_COMBINE = {"and": 0, "or": 1, "xor": 2}
_UNSIGNED_ORDER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@rule("setp")
def _compare(s: Statement) -> Encoding:
    comparison, *combine, type = _modifiers(s, ("ftz",))
    comparison = _UNSIGNED_ORDER.get(comparison, comparison)
    if comparison in ("eq", "ne"):
        type = _register_type(type)
    d, a, b, *other = s.operands
    p, q = [*d.split("|"), "_"][:2]
    other = other[0] if other else "1"
    return Encoding(
        f"setp.{comparison}.{type}",
        _typed([p, q], "pred"),
        (*_typed([a, b], type), Typed(other.lstrip("!"), "pred")),
        (_COMBINE[combine[0]] if combine else 0, other.startswith("!")),
    )


@rule("selp")
def _select(s: Statement) -> Encoding:
    type = f"u{8 * TYPE_BYTES[_modifiers(s)[0]]}"
    d, a, b, p = s.operands
    return Encoding(f"selp.{type}", _typed([d], type), (*_typed([a, b], type), Typed(p, "pred")))


# ---------------------------------------------------------------------------- memory


def _address(text: str) -> tuple[str, int]:
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
    parts = _modifiers(s, _MEMORY | _VECTORS)
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
    base, offset = _address(address)
    immediates = (TYPE_BYTES[type], offset, type[0] == "s")
    results = _typed(vector(registers), f"any {type}")
    if space == "param":
        return Encoding("ld.param", results, (Typed(base, "parameter"),), immediates)
    return Encoding(f"ld.{space}", results, (Typed(base, "address"),), immediates)


@rule("st")
def _store(s: Statement) -> Encoding:
    address, registers = s.operands[:2]
    space, type = _space(s), _memory_type(s, registers)
    base, offset = _address(address)
    sources = (Typed(base, "address"), *_typed(vector(registers), f"any {type}"))
    return Encoding(f"st.{space}", (), sources, (TYPE_BYTES[type], offset))


@rule("atom", "red")
def _atomic(s: Statement) -> Encoding:
    operation, type = _without_space(s)
    if operation not in ("min", "max"):
        type = _register_type(type)
    space = "shared" if _space(s) == "shared" else "global"  # generic ones are taken for global
    operands = s.operands if s.parts[0] == "atom" else ("_", *s.operands)
    results, address, values, *other = operands
    values = vector(values)
    results = ("_",) * len(values) if results == "_" else vector(results)
    base, offset = _address(address)
    return Encoding(
        f"atom.{space}.{operation}.{type}",
        _typed(results, type),
        (Typed(base, "address"), *_typed([*values, *other], type)),
        (TYPE_BYTES[type], offset),
    )


@rule("cp")
def _copy(s: Statement) -> Encoding:
    parts = _modifiers(s)
    if parts[0] != "async" or "bulk" in parts or "mbarrier" in parts:
        raise NotSupported(f"{s}{_REASONS['mbarrier']}")
    if parts[1] == "commit_group":
        return Encoding("cp.async.commit_group")
    if parts[1] == "wait_group":
        return Encoding("cp.async.wait_group", immediates=(int(s.operands[0], 0),))
    if parts[1] == "wait_all":
        return Encoding("cp.async.wait_all")
    to, source, size, *read = s.operands
    (to, to_offset), (source, source_offset) = _address(to), _address(source)
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


# ---------------------------------------------------------------------------- control, collectives


@rule("bra")
def _branch(s: Statement) -> Encoding:
    return Encoding("bra", target=s.operands[0])


@rule("ret", "exit")
def _exit(s: Statement) -> Encoding:
    return Encoding("exit")


@rule("trap")
def _trap(s: Statement) -> Encoding:
    return Encoding("trap")


def _collective(mask: str, operation: str, destinations, sources, extra: int = 0) -> Encoding:
    """An operation that waits for the lanes of a mask, its last source."""
    sources = (*sources, Typed(mask, "u32"))
    immediates = (0, len(destinations) + len(sources) - 1, extra)
    return Encoding(operation, tuple(destinations), sources, immediates)


_WHOLE_WARP = (ALL_LANES, -1)


@rule("bar", "barrier")
def _barrier(s: Statement) -> Encoding:
    parts = _modifiers(s, ("aligned", "cta"))
    if parts == ["warp", "sync"]:
        return _collective(s.operands[0], "bar.warp.sync", (), ())
    if parts != ["sync"]:
        raise NotSupported(str(s))
    barrier, count = [*s.operands, "0"][:2]
    return Encoding("bar.sync", (), _typed([barrier, count], "u32"), _WHOLE_WARP)


@rule("shfl")
def _shuffle(s: Statement) -> Encoding:
    mode, _ = _modifiers(s, _COLLECTIVE)
    d, a, b, c, mask = s.operands
    value, inside = [*d.split("|"), "_"][:2]
    destinations = (Typed(value, "u32"), Typed(inside, "pred"))
    return _collective(mask, f"shfl.{mode}", destinations, _typed([a, b, c], "u32"))


@rule("vote")
def _vote(s: Statement) -> Encoding:
    mode, type = _modifiers(s, _COLLECTIVE)
    d, p, mask = s.operands
    destinations = (Typed(d, "u32" if type == "b32" else "pred"),)
    sources = (Typed(p.lstrip("!"), "pred"),)
    return _collective(mask, f"vote.{mode}", destinations, sources, p.startswith("!"))


@rule("redux")
def _reduce(s: Statement) -> Encoding:
    operation, type = _modifiers(s, _COLLECTIVE)
    if operation not in ("min", "max"):
        type = _register_type(type)
    d, a, mask = s.operands
    return _collective(mask, f"redux.{operation}.{type}", _typed([d], type), _typed([a], type))


@rule("activemask")
def _active_mask(s: Statement) -> Encoding:
    return Encoding("activemask", _typed(s.operands, "u32"))


# ---------------------------------------------------------------------------- tensor core


@rule("mma")
def _mma(s: Statement) -> Encoding:
    shape, *rest = _modifiers(s, _COLLECTIVE)
    rows, columns, *types = rest
    if (rows, columns) != ("row", "col") or types[0] != "f32" or types[3] != "f32":
        raise NotSupported(str(s))
    d, *sources = s.operands
    registers = [register for source in sources for register in vector(source)]
    return Encoding(
        f"mma.{shape}.{types[1]}", _typed(vector(d), "b32"), _typed(registers, "b32"), _WHOLE_WARP
    )


@rule("ldmatrix", "stmatrix")
def _matrix(s: Statement) -> Encoding:
    parts = [p.split("::")[0] for p in _modifiers(s, _COLLECTIVE)]
    if parts[0] != "m8n8" or parts[-1] != "b16" or "shared" not in parts:
        raise NotSupported(str(s))
    operation = s.parts[0] + (".trans" if "trans" in parts else "")
    if s.parts[0] == "ldmatrix":
        registers, address = s.operands
        base, offset = _address(address)
        results = _typed(vector(registers), "b32")
        return Encoding(operation, results, (Typed(base, "address"),), (*_WHOLE_WARP, offset))
    address, registers = s.operands
    base, offset = _address(address)
    sources = (Typed(base, "address"), *_typed(vector(registers), "b32"))
    return Encoding(operation, (), sources, (*_WHOLE_WARP, offset))


@rule("wgmma")
def _wgmma(s: Statement) -> Encoding:
    operation, *rest = _modifiers(s, _COLLECTIVE)
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
    left = _typed(vector(a), "b32") if in_registers else (Typed(a, "b64"),)
    accumulators = _typed(vector(d), "b32")
    return Encoding(
        operation,
        accumulators,
        (*left, Typed(b, "b64"), Typed(adds, "pred"), *accumulators),
        (*_WHOLE_WARP, sum(bool(flag) << bit for bit, flag in enumerate(flags))),
    )
