"""What the instructions of a call occupy, by function, on any instruction set of this x86-64 CPU.

    python -m bench.ports [--isa NAME] [--case PATTERN]

The call runs one instruction at a time (trace.c), every address is looked up in the library's
disassembly, and two lengths are subtracted, so that what is left is one token and head far from
both ends. What the C library copies is not in it; a repeated string instruction counts each time.

Vector operations are what competes for the vector units with the multiply-adds of the products:
where two of them start per cycle (512 bits on Intel, 256 on most), half their number is the least
time, and useful multiply-adds over all of them the largest share of the FMA rate. Loads and stores
have units of their own.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import lolcats_ops as lo
from lolcats_ops import _C

from .cases import Case, select
from .instructions import call, driver
from .sequential import compiler

TRACER = Path(__file__).with_name("trace.c")
# Windows are full and the state is not empty from T on; blocks have 32 tokens.
_HYBRID = Case("hybrid_attention", H=1, Hk=1, T=192)
MORE = 64
CASES: tuple[Case, ...] = (
    _HYBRID,
    replace(_HYBRID, D=128, V=128),
    replace(_HYBRID, dtype="bfloat16"),
    replace(_HYBRID, D=128, V=128, dtype="bfloat16"),
    replace(_HYBRID, pass_="backward"),
    replace(_HYBRID, pass_="backward", dtype="bfloat16"),
    replace(_HYBRID, op="feature_map"),
    replace(_HYBRID, op="linear_attention", D=128, f=0, window=0),
)

# Moves between registers are renamed away; moves from memory and broadcasts of it are loads.
_MOVES = re.compile(r"vmov(u|a)p.|vmovdq.*|vmovs[sd]|vmov[dq]|vmovnt.*|vp?broadcast.*")
_STORE = re.compile(r"\)(\{.*\})?$")  # AT&T syntax names the destination last, and masks behind it
_NO_ACCESS = ("lea", "prefetch", "j", "call")
# Operations of more than one micro-operation, in 512 bits on Intel.
_SEVERAL = {"vrcp14ps": 3, "vdivps": 3}


@dataclass
class Work:
    """Per token and head."""

    instructions: float = 0.0
    vector: float = 0.0  # operations of the vector units, multiply-adds included
    multiply_adds: float = 0.0  # whole vectors of them, or of products of pairs
    tiles: float = 0.0  # products of the matrix unit
    loads: float = 0.0
    stores: float = 0.0

    def add(self, instruction: str, times: float) -> None:
        """Counts an instruction of the disassembly (AT&T syntax)."""
        self.instructions += times
        if "nop" in instruction:
            return
        name, _, operands = re.sub(r"\s*(#|<).*", "", instruction).partition(" ")
        operands = operands.strip()
        memory = "(" in operands and not name.startswith(_NO_ACCESS)
        self.vector += vector_operations(name, operands) * times
        self.multiply_adds += times * name.startswith(("vfm", "vfnm", "vdpbf16"))
        self.tiles += times * name.startswith("tdp")
        to_memory = _STORE.search(operands) is not None and not name.startswith(("cmp", "test"))
        self.loads += times * (memory and not to_memory)
        self.stores += times * (memory and to_memory)


def vector_operations(name: str, operands: str) -> int:
    """How often an instruction occupies one of the vector units."""
    registers = re.findall(r"%([xyz]mm\d+|k\d)", operands)
    if not registers:
        return 0
    if _MOVES.fullmatch(name):
        masked = "{%k" in operands
        between = "(" not in operands
        across = "broadcast" in name or "%r" in operands or "%e" in operands
        return int(masked or (between and across))
    if "xor" in name and len(registers) == 3 and registers[0] == registers[1]:
        return 0  # a zero
    return _SEVERAL.get(name, 1) if "%zmm" in operands else 1


def why_not() -> str | None:
    """Why calls cannot be traced here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "needs Linux on x86-64"
    if shutil.which("objdump") is None:
        return "needs objdump"
    return None if compiler() else "needs a C compiler"


@cache
def disassembly(isa: str) -> dict[int, tuple[str, str]]:
    """Function and instruction at every address of the installed library."""
    command = ["objdump", "-d", "-C", "-w", "--no-show-raw-insn", str(lo.get_library())]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of: dict[int, tuple[str, str]] = {}
    function = ""
    for line in listing.splitlines():
        if start := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            function = start[1].replace("(anonymous namespace)::", "")
            function = function.removeprefix("void ").replace("lol::", "").replace(f"{isa}::", "")
            function = re.sub(r" \[clone .*|\(Format\)|\(Into\)", "", function)
            function = re.sub(r"\(.*", "", function)
        elif code := re.match(r"^ *([0-9a-f]+):\t(.*)$", line):
            of[int(code[1], 16)] = (function, code[2])
    return of


@contextmanager
def tracer() -> Iterator[Path]:
    """The program of trace.c."""
    with TemporaryDirectory() as folder:
        program = Path(folder, "trace")
        subprocess.run([str(compiler()), "-O2", str(TRACER), "-o", str(program)], check=True)
        yield program


def traced(
    what: str, trace: Path, program: Path, isa: str, case: Case
) -> Iterator[tuple[int, int]]:
    """Addresses of the library and how often one thread runs the instruction there, in one call.

    ``what`` is "counts", or "order": each time that it runs, one after another.
    """
    mapped, lines = call([str(trace), what, str(program)], case, isa).split("\n\n")
    ours = [line for line in mapped.splitlines() if line.endswith(Path(lo.get_library()).name)]
    begin = int(ours[0].split("-")[0], 16)
    end = int(ours[-1].split()[0].split("-")[1], 16)
    for line in lines.splitlines():
        address, _, times = line.partition(" ")
        if begin <= int(address, 16) < end:
            yield int(address, 16) - begin, int(times or 1)


def executed(trace: Path, program: Path, isa: str, case: Case) -> Counter[int]:
    """How often one call runs the instruction at each of the library's addresses."""
    return Counter(dict(traced("counts", trace, program, isa, case)))


def per_token(trace: Path, program: Path, isa: str, case: Case) -> dict[str, Work]:
    """The work of one token and head in the middle of a sequence, by function."""
    longer = replace(case, T=case.T + MORE)
    times = executed(trace, program, isa, longer)
    times.subtract(executed(trace, program, isa, case))
    tokens = longer.tokens - case.tokens
    work: dict[str, Work] = {}
    for address, (function, instruction) in disassembly(isa).items():
        if times[address]:
            work.setdefault(function, Work()).add(instruction, times[address] / tokens)
    return work


def total(work: dict[str, Work]) -> Work:
    """The sum over all functions."""
    sums = {f.name: sum(getattr(w, f.name) for w in work.values()) for f in fields(Work)}
    return Work(**sums)


def make_parser(prog: str, about: str | None, cases: tuple[Case, ...]) -> argparse.ArgumentParser:
    """A parser of what every command can be told that traces some of ``cases``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sets = [isa for isa in _C.cpu_isas() if isa != "scalar"]  # whose SSE Work does not know
    parser.add_argument("--isa", choices=sets, default=sets[0], help="default: %(default)s")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="PATTERN",
        help="those that contain it: " + ", ".join(map(str, cases)),
    )
    return parser


def chosen(
    parser: argparse.ArgumentParser, cases: tuple[Case, ...], why_not: str | None
) -> tuple[argparse.Namespace, list[Case]]:
    """The options of the command line, and which of ``cases`` they name.

    Exits where they name none, or where ``why_not`` says why nothing can be traced here.
    """
    options = parser.parse_args()
    if why_not:
        parser.exit(1, f"{parser.prog}: {why_not}\n")
    try:
        return options, select(options.case, cases)
    except ValueError as error:
        parser.error(f"{error}; --help shows them all")


def main() -> None:
    """Prints the work of every case."""
    options, cases = chosen(make_parser("bench.ports", __doc__, CASES), CASES, why_not())
    names = [f.name.replace("_", " ") for f in fields(Work)]
    with tracer() as trace, driver("-DTRACED") as program:
        for case in cases:
            work = per_token(trace, program, options.isa, case)
            print(f"\n{case}, {options.isa}, per token and head")
            print(" " * 44 + "".join(f"{name:>15}" for name in names))
            rows = sorted(work.items(), key=lambda item: -item[1].instructions)
            shown = [row for row in rows if row[1].instructions >= 0.01 * total(work).instructions]
            for function, of_it in [*shown, ("total", total(work))]:
                values = (getattr(of_it, f.name) for f in fields(Work))
                print(f"{function[-43:]:44}" + "".join(f"{value:15.1f}" for value in values))


if __name__ == "__main__":
    main()
