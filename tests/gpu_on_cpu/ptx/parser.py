"""PTX text to statements: entry points, parameters, variables in shared memory, instructions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from .errors import NotSupported, PtxError

# Bytes of a value; predicates take a bit.
TYPE_BYTES = {f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)}
TYPE_BYTES |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "tf32": 4}
TYPE_BYTES |= {"pred": 0}


@dataclass(frozen=True)
class Parameter:
    """A parameter of an entry point, at its offset in the buffer of parameters."""

    name: str
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class SharedVariable:
    """An array in shared memory; extern ones have size 0 and begin where the others end."""

    name: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Statement:
    """An instruction: ``@guard opcode operands``, with the innermost scope that it stands in."""

    opcode: str
    operands: tuple[str, ...]
    guard: str
    scope: int
    text: str
    location: str  # "kernel.py:12", or empty

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.location})" if self.location else "")


@dataclass
class Entry:
    """An entry point. Scopes are numbered; ``parents`` says which one encloses which."""

    name: str
    parameters: list[Parameter]
    shared: list[SharedVariable]
    threads: tuple[int, int, int] | None
    statements: list[Statement] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)  # to an index of statements
    registers: dict[tuple[int, str], str] = field(default_factory=dict)  # name or prefix to type
    parents: dict[int, int] = field(default_factory=dict)

    @property
    def static_shared_bytes(self) -> int:
        return max((v.offset + v.bytes for v in self.shared), default=0)

    def looped(self) -> set[int]:
        """The statements that lie in a loop, between a label and a branch back to it."""
        result: set[int] = set()
        for index, statement in enumerate(self.statements):
            if statement.parts[0] == "bra":
                label = self.find(self.labels, statement.scope, statement.operands[0])
                result.update(range(self.labels[label], index + 1))
        return result

    def find(self, table: Mapping[tuple[int, str], object], scope: int, *names: str):
        """The key of the first of these names in the innermost scope that has one, or None."""
        while scope >= 0:
            for name in names:
                if (scope, name) in table:
                    return scope, name
            scope = self.parents.get(scope, -1)
        return None


def split_operands(text: str) -> tuple[str, ...]:
    """Splits at commas outside of braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return tuple(part.strip() for part in parts)


def vector(operand: str) -> tuple[str, ...]:
    """The elements of ``{a, b}``, or the operand itself."""
    return split_operands(operand.strip()[1:-1]) if operand.startswith("{") else (operand,)


def parse(ptx: str, entry: str | None = None) -> Entry:
    """The entry point of that name, or the only one."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', ptx, re.M))
    ptx = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    pattern = r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{"
    found = {match[1]: match for match in re.finditer(pattern, ptx)}
    if not found:
        raise PtxError("no entry point in this PTX")
    if entry is None and len(found) > 1:
        raise PtxError(f"several entry points, name one: {', '.join(found)}")
    if entry is not None and entry not in found:
        raise PtxError(f"no entry point {entry!r}, but {', '.join(found)}")
    match = found[entry] if entry else next(iter(found.values()))
    body = _body(ptx, match.end())
    first = min(m.start() for m in found.values())
    shared = _shared_variables(ptx[:first] + body)
    result = Entry(match[1], _parameters(match[2] or ""), shared, _threads(match[3]))
    _Body(result, files).read(body)
    return result


def _body(ptx: str, start: int) -> str:
    depth = 1
    for brace in re.finditer(r"[{}]", ptx[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return ptx[start : start + brace.start()]
    raise PtxError("the entry point has no end")


def _parameters(text: str) -> list[Parameter]:
    result, end = [], 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?", declaration, re.S
        )
        if not match or match[2] not in TYPE_BYTES:
            raise NotSupported(f"parameter `{declaration}`")
        size = TYPE_BYTES[match[2]]
        align = int(match[1] or size)
        offset = -(-end // align) * align
        total = size * int(match[4] or 1)
        result.append(Parameter(match[3], match[2], offset, total))
        end = offset + total
    return result


def _threads(directives: str) -> tuple[int, int, int] | None:
    match = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    return tuple(int(size or 1) for size in match.groups()) if match else None


def _shared_variables(text: str) -> list[SharedVariable]:
    """Lays out static arrays one after another, then all extern ones at the same place."""
    pattern = r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
    static, extern, end, align = [], [], 0, 16
    for match in re.finditer(pattern, text):
        count = 0 if match[5] == "" else int(match[5] or 1)
        if match[1] or not count:
            extern.append(match[4])
            align = max(align, int(match[2] or 1))
            continue
        size = TYPE_BYTES[match[3]]
        own_align = int(match[2] or size)
        offset = -(-end // own_align) * own_align
        static.append(SharedVariable(match[4], offset, size * count))
        end = offset + size * count
    end = -(-end // align) * align
    return static + [SharedVariable(name, end, 0) for name in dict.fromkeys(extern)]


class _Body:
    """Reads the body of an entry point into it."""

    # Directives that end with their line; a label; a scope; a directive or an instruction.
    _TOKEN = re.compile(
        r"\s*(?:\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*|"
        r"\.(?:file|section|pragma)[^\n]*|"
        r"(?P<label>[\w$]+)\s*:(?!:)|"
        r"(?P<open>\{)|(?P<close>\})|"
        r"(?P<statement>(?:[^;{}]|\{[^}]*\})+);|;)"
    )

    def __init__(self, entry: Entry, files: dict[str, str]):
        self.entry, self.files = entry, files
        self.scope, self.scopes, self.location = 0, 1, ""

    def read(self, text: str) -> None:
        text, position = text.rstrip(), 0
        while position < len(text):
            token = self._TOKEN.match(text, position)
            if token is None:
                raise PtxError(f"not understood: `{text[position : position + 80].strip()}`")
            self._take(token)
            position = token.end()

    def _take(self, token: re.Match) -> None:
        if token["line"]:
            name = PurePosixPath(self.files.get(token["file"], "")).name
            self.location = f"{name}:{token['line']}" if int(token["line"]) else ""
        elif token["label"]:
            self.entry.labels[self.scope, token["label"]] = len(self.entry.statements)
        elif token["open"]:
            self.entry.parents[self.scopes] = self.scope
            self.scope, self.scopes = self.scopes, self.scopes + 1
        elif token["close"]:
            self.scope = self.entry.parents[self.scope]
        elif token["statement"]:
            self._statement(" ".join(token["statement"].split()))

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".shared"):
            pass  # read before
        elif text.startswith("."):
            raise NotSupported(f"`{text}`")
        else:
            match = re.fullmatch(r"(?:@(!?[\w$%]+)\s+)?([\w.:]+)\s*(.*)", text)
            if not match:
                raise PtxError(f"not understood: `{text}`")
            operands = split_operands(match[3])
            self.entry.statements.append(
                Statement(match[2], operands, match[1] or "", self.scope, text, self.location)
            )

    def _declare(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text)
        if not match or match[1] not in TYPE_BYTES:
            raise NotSupported(f"`{text}`")
        for name in split_operands(match[2]):
            prefix = re.fullmatch(r"([\w$%]+)<\d+>", name)
            key = prefix[1] + "#" if prefix else name  # "%r#": %r0, %r1, ...
            self.entry.registers[self.scope, key] = match[1]
