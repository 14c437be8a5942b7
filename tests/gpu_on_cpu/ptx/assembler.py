"""Statements to a program of the machine: registers, constants and branches get their places.

The structures mirror those of ``runtime/machine.h``.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping
from ctypes import POINTER, c_int32, c_uint8

from .errors import NotSupported, PtxError
from .instructions import Typed, encode
from .parser import TYPE_BYTES, Entry, Statement

LANES = 32
_ALIGN = 64  # of a register; wgmma.cpp counts on it
_AXES = "xyz"
_SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in _AXES]


class Operand(ctypes.Structure):
    _fields_ = [("offset", c_int32), ("bytes", c_int32)]


class Instruction(ctypes.Structure):
    _fields_ = [
        ("operation", c_int32),
        ("guard", c_int32),
        ("guard_negated", c_int32),
        ("first_operand", c_int32),
        ("destinations", c_int32),
        ("operands", c_int32),
        ("immediate", c_int32 * 4),
    ]


class Program(ctypes.Structure):
    _fields_ = [
        ("code", POINTER(Instruction)),
        ("instructions", c_int32),
        ("operands", POINTER(Operand)),
        ("register_bytes", c_int32),
        ("initial_registers", POINTER(c_uint8)),
        ("special", c_int32 * 12),
        ("lane_id", c_int32),
        ("warp_id", c_int32),
    ]


class _Registers:
    """Gives registers, constants and special registers their places, when they are first used."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.places: dict[object, tuple[int, int]] = {}
        self.constants: list[tuple[int, bytes]] = []
        self.end = 0
        # Addresses in a space of their own: those of shared memory and those of the parameters.
        self.named = {v.name: v.offset for v in (*entry.shared, *entry.parameters)}

    def place(self, key: object, size: int) -> tuple[int, int]:
        if key not in self.places:
            self.places[key] = (self.end, size)
            self.end += -(-max(size * LANES, 4) // _ALIGN) * _ALIGN
        return self.places[key]

    def constant(self, value: int, size: int) -> tuple[int, int]:
        key = ("constant", value, size)
        known = key in self.places
        place = self.place(key, size)
        if not known:
            bits = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little") * LANES
            if size == 0:
                bits = (b"\xff" if value else b"\0") * 4
            self.constants.append((place[0], bits))
        return place

    def operand(self, typed: Typed, scope: int) -> tuple[int, int]:
        text, type = typed.text, typed.type
        any_width = type.startswith("any ") or type == "address"
        type = "b64" if type == "address" else type.removeprefix("any ")
        size = TYPE_BYTES[type]
        if text == "_":
            return self.place(("nobody reads", size), size)
        if text in _SPECIAL or text in ("%laneid", "%warpid"):
            return self.place(text, 4)
        if (declared := self._declared(text, scope)) is not None:
            key, own_size = declared
            if own_size != size and not any_width:
                raise NotSupported(f"{text} of {own_size} bytes as {type}")
            return self.place(key, own_size)
        if text in self.named:
            return self.constant(self.named[text], size)
        return self.constant(_literal(text, type), size)

    def _declared(self, text: str, scope: int) -> tuple[object, int] | None:
        """A register and its bytes, if it is one: declared by its name, or as %r<100>."""
        declared = self.entry.registers
        key = self.entry.find(declared, scope, text, re.sub(r"\d+$", "#", text))
        return None if key is None else ((key[0], text), TYPE_BYTES[declared[key]])

    def initial(self) -> bytearray:
        result = bytearray(self.end)
        for offset, bits in self.constants:
            result[offset : offset + len(bits)] = bits
        return result


def _literal(text: str, type: str) -> int:
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        bits = int(match[1], 16)
        if type == "f64":  # a float literal where a double is needed
            value = struct.unpack("<f", bits.to_bytes(4, "little"))[0]
            return int.from_bytes(struct.pack("<d", value), "little")
        return bits
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    raise NotSupported(f"operand `{text}`")


class Assembler:
    """Turns an entry point into a program; ``operations`` are the machine's, by name."""

    def __init__(self, entry: Entry, operations: Mapping[str, tuple[int, int]]):
        self.entry, self.operations = entry, operations
        self.registers = _Registers(entry)
        self.operands: list[tuple[int, int]] = []
        # Falling off the end is an exit.
        self.code = [self._instruction(s) for s in entry.statements]
        self.code.append((operations["exit"][0], -1, 0, 0, 0, 0, (0,) * 4))

    def program(self) -> Program:
        """The program, with everything it points to kept alive by it."""
        code = (Instruction * len(self.code))(*self.code)
        operands = (Operand * max(1, len(self.operands)))(*self.operands)
        initial = (c_uint8 * max(1, self.registers.end)).from_buffer(self.registers.initial())
        special = [self.registers.places.get(name, (-1, 0))[0] for name in _SPECIAL]
        lane_and_warp = (
            self.registers.places.get(name, (-1, 0))[0] for name in ("%laneid", "%warpid")
        )
        return Program(
            code,
            len(code),
            operands,
            self.registers.end,
            initial,
            (c_int32 * 12)(*special),
            *lane_and_warp,
        )

    def _instruction(self, s: Statement) -> tuple:
        try:
            return self._encoded(s)
        except NotSupported as error:
            if s.text in str(error):
                raise
            raise NotSupported(f"{str(error).removeprefix('not supported: ')} in {s}") from None

    def _encoded(self, s: Statement) -> tuple:
        encoding = encode(s)
        if encoding.operation not in self.operations:
            raise NotSupported(str(s))
        immediates = list(encoding.immediates) + [0] * (4 - len(encoding.immediates))
        if encoding.target:
            immediates[0] = self._target(s, encoding.target)
        sources = encoding.sources
        first = len(self.operands)
        for typed in (*encoding.destinations, *sources):
            self.operands.append(self.registers.operand(typed, s.scope))
        operation, wanted = self.operations[encoding.operation]
        given = len(self.operands) - first
        if wanted not in (-1, given):
            raise PtxError(f"{given} operands, {encoding.operation} takes {wanted}: {s}")
        guard = -1
        if s.guard:
            guard = self.registers.operand(Typed(s.guard.lstrip("!"), "pred"), s.scope)[0]
        return (
            operation,
            guard,
            s.guard.startswith("!"),
            first,
            len(encoding.destinations),
            given,
            tuple(immediates),
        )

    def _target(self, s: Statement, label: str) -> int:
        key = self.entry.find(self.entry.labels, s.scope, label)
        if key is None:
            raise PtxError(f"no label {label}: {s}")
        return self.entry.labels[key]
