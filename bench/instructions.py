"""Instructions per useful FLOP on AVX2, against the budget of instructions.json.

    python -m bench.instructions            prints them beside the budget
    python -m bench.instructions --update   makes them the budget

Counts say nothing of caches and ports, but they are the same on every machine and at every load,
which seconds are not: they are what CI can hold the kernels to. They come from valgrind, which
knows AVX2 and not AVX-512, and depend on the compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import lolcats_ops as lo
from lolcats_ops import _C

from .cases import Case
from .sequential import compiler

ISA = "avx2"
SLACK = 1.03
BUDGET = Path(__file__).with_name("instructions.json")
SOURCE = Path(__file__).with_name("instructions.c")

_HYBRID = Case("hybrid_attention", H=1, Hk=1, T=192)  # valgrind takes a second for 10 MFLOP
CASES: tuple[Case, ...] = (
    _HYBRID,
    replace(_HYBRID, dtype="bfloat16"),
    replace(_HYBRID, D=128, V=128),
    replace(_HYBRID, pass_="backward"),
    replace(_HYBRID, pass_="backward", dtype="bfloat16"),
    replace(_HYBRID, op="attention_transfer"),
    replace(_HYBRID, op="attention_transfer", pass_="backward"),
    replace(_HYBRID, op="feature_map"),
    replace(_HYBRID, op="feature_map", pass_="backward"),
    replace(_HYBRID, op="linear_attention", D=128, f=0, window=0),
    replace(_HYBRID, op="linear_attention", window=0),
    replace(_HYBRID, pass_="step", H=9, Hk=3),
)


@dataclass(frozen=True)
class Count:
    """What one call takes."""

    instructions_per_flop: float
    allocations: int


def why_not() -> str | None:
    """Why instructions cannot be counted here, or None."""
    if platform.system() != "Linux" or ISA not in _C.cpu_isas():
        return f"needs Linux and {ISA}"
    if shutil.which("valgrind") is None:
        return "needs valgrind"
    return None if compiler() else "needs a C compiler"


def built_by() -> str:
    """The compiler of the installed library, by what it leaves there."""
    library = Path(lo.get_library()).read_bytes()
    signature = re.search(rb"(GCC): \([^)]*\) ([\d.]+)|(clang) version ([\d.]+)", library)
    if signature is None:
        return "unknown"
    return " ".join(word.decode() for word in signature.groups() if word)


def count_all(cases: Sequence[Case] = CASES) -> dict[str, Count]:
    """Counts cases, as many at a time as there are CPUs, by their names."""
    with driver() as program, ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(partial(count, program), cases)
        return {str(case): now for case, now in zip(cases, counts, strict=True)}


@contextmanager
def driver(*flags: str) -> Iterator[Path]:
    """The program that makes one call, compiled against the installed library."""
    with TemporaryDirectory() as folder:
        program = Path(folder, "instructions")
        library = Path(lo.get_library())
        command = [str(compiler()), "-O1", "-std=c11", *flags, str(SOURCE), "-o", str(program)]
        command += [f"-I{lo.get_include()}", str(library), f"-Wl,-rpath,{library.parent}"]
        subprocess.run(command, check=True)
        yield program


def count(program: Path, case: Case) -> Count:
    """Instructions of one call per useful FLOP, by one thread, and its heap allocations."""
    profile = program.with_name(f"{case}.out")
    valgrind = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
    printed = call([*valgrind, f"--callgrind-out-file={profile}", str(program)], case, ISA)
    total = re.search(r"^(?:summary|totals): (\d+)", profile.read_text(), re.MULTILINE)
    assert total is not None
    return Count(round(int(total[1]) / case.flops, 5), int(printed))


def call(command: Sequence[str], case: Case, isa: str) -> str:
    """What the driver, at the end of ``command``, prints of a case, on one thread.

    Raises:
        RuntimeError: it failed; with what it wrote to stderr.
    """
    step = case.pass_ == "step"
    op, backward = "step" if step else case.op, int(case.pass_ == "backward")
    sizes = (case.B, case.H, case.Hk, 1 if step else case.T, case.D, case.V, case.f, case.window)
    done = subprocess.run(
        [*command, op, str(backward), case.dtype, *map(str, sizes)],
        env={**os.environ, "LOLCATS_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr}")
    return done.stdout


def load_budget() -> tuple[str, dict[str, Count]]:
    """The compiler it was made with, and the counts by case."""
    saved = json.loads(BUDGET.read_text())
    return saved["compiler"], {name: Count(**c) for name, c in saved["counts"].items()}


def save_budget(counts: dict[str, Count]) -> None:
    """Makes these counts the budget."""
    saved = {"compiler": built_by(), "counts": {name: asdict(c) for name, c in counts.items()}}
    BUDGET.write_text(json.dumps(saved, indent=1) + "\n")


def main() -> None:
    """Counts every case."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", action="store_true", help="make these counts the budget")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"bench.instructions: {reason}")
    made_by, budget = load_budget() if BUDGET.exists() else ("", {})
    if budget and made_by != built_by() and not options.update:
        print(f"the budget is of {made_by}, the library of {built_by()}")
    counts = count_all()
    print(f"{'instructions per useful FLOP':<54} {'now':>8} {'budget':>8}  allocations")
    for name, now in counts.items():
        shown = f"{budget[name].instructions_per_flop:8.4f}" if name in budget else " " * 8
        print(f"{name:<54} {now.instructions_per_flop:8.4f} {shown}  {now.allocations}")
    if options.update:
        save_budget(counts)
        print(f"wrote {BUDGET}")


if __name__ == "__main__":
    main()
