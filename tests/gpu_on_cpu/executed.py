"""How often the machine instructions of a kernel are executed, from a run of its PTX on the CPU.

Both carry source lines (``-lineinfo``). The machine instructions of a line are taken to be executed
as often as the line's PTX instructions on average, a line being told apart by where it was inlined.
An estimate: it is wrong where the instructions of one line are executed unequally often, and leaves
out machine instructions of lines that no PTX instruction has.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Line = tuple[str, ...]  # file and line; those of the call, where it was inlined

_FILE = re.compile(r'\.file\s+(\d+) "([^"]+)"')
_LOC = re.compile(r"\.loc\s+(\d+) (\d+) \d+(?:, function_name \S+, inlined_at (\d+) (\d+))?")
_PTX = re.compile(r"(?:@!?%p\d+\s+)?([a-z][\w.:]*)")
_COMMENT = re.compile(r'//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')
_SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def executed_opcodes(ptx: str, sass: str, executed: Sequence[tuple[str, float]]) -> Counter[str]:
    """Machine opcodes and how often they were executed.

    Args:
        ptx: of a kernel, with lines.
        sass: of the same source, as ``nvdisasm -gi -c`` lists it.
        executed: of the PTX instructions, in their order, opcode and number (``Report.executed``).

    Raises:
        ValueError: ``executed`` is of other PTX, or the two have no line in common.
    """
    lines = list(_lines_of_ptx(ptx))
    if [opcode for opcode, _ in lines] != [opcode for opcode, _ in executed]:
        raise ValueError("the executed instructions are not those of the PTX")
    static, dynamic = Counter[Line](), Counter[Line]()
    for (_, line), (_, times) in zip(lines, executed, strict=True):
        static[line] += 1
        dynamic[line] += times
    of_line = defaultdict[Line, Counter[str]](Counter)
    for opcode, line in _lines_of_sass(sass):
        of_line[line][opcode] += 1
    if not of_line.keys() & static.keys():
        raise ValueError("PTX and machine code have no line in common: compile with -lineinfo")
    result = Counter[str]()
    for line in of_line.keys() & static.keys():
        for opcode, count in of_line[line].items():
            result[opcode] += count * dynamic[line] / static[line]
    return result


def _lines_of_ptx(ptx: str) -> Iterator[tuple[str, Line]]:
    files = {number: Path(path).name for number, path in _FILE.findall(ptx)}
    line: Line = ()
    for text in map(str.strip, ptx.splitlines()):
        if match := _LOC.match(text):
            file, number, outer, outer_number = match.groups()
            line = (files[file], number, *((files[outer], outer_number) if outer else ()))
        elif match := _PTX.match(text):
            yield match[1], line


def _lines_of_sass(sass: str) -> Iterable[tuple[str, Line]]:
    line: Line = ()
    described = False  # by the innermost of the comments before an instruction
    for text in map(str.strip, sass.splitlines()):
        if match := _COMMENT.match(text):
            if not described:
                file, number, outer, outer_number = match.groups()
                line = (
                    Path(file).name,
                    number,
                    *((Path(outer).name, outer_number) if outer else ()),
                )
            described = True
        elif match := _SASS.match(text):
            described = False
            yield match[1], line
