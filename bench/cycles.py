"""The cycles that a core would take for a call if all its operands lay in L1, by function.

    python -m bench.cycles [--core NAME] [--isa NAME] [--case PATTERN]

The call runs one instruction at a time (trace.c), and those of one block of 32 tokens, in their
order, go through llvm-mca's model of a core (LLVM 19 or later): units, latencies, and how far it
looks ahead of the oldest instruction that waits. It foresees every branch and knows neither caches
nor a second thread. So what is above the busiest unit's cycles is lost in waiting for results, and
what a measurement is above all of that is lost in memory, branches and by other programs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import ports
from .cases import Case
from .instructions import driver

CASES = tuple(case for case in ports.CASES if case.pass_ == "forward" and case.op != "feature_map")
BLOCK = 32  # tokens, of kernels/cpu/gemm.h
OLDEST = 19  # of LLVM: 14 had multiply-adds of Zen 3 start once a cycle

# What cores handle aside, or a model has wrong where it has been measured (docs/limits.md).
_ASIDE = re.compile(r"call|ret|nop|data16|cs nop|xchg|bnd|rep|(sub|add|and|lea) .*,%rsp$")
_OF_CORE = {
    "znver4": (
        (r"^vbroadcastss (.*\(.*\),%zmm)", r"vmovups \1"),  # free, up to half as many as FMAs
        (r"^vdpbf16ps ", "vfmadd231ps "),  # starts as often
    )
}


def assembly(instruction: str, core: str) -> str | None:
    """An instruction of the disassembly (AT&T syntax) for llvm-mca; None: it takes no unit."""
    text = " ".join(re.sub(r"\s*(#|<).*", "", instruction).split())
    if _ASIDE.match(text):
        return None
    if text.startswith("j"):
        return "nop"
    # %rsp is kept up to date by a unit of its own: calls do not wait for one another's pushes.
    text = re.sub(r"^push ([%$]\S+)$", r"movq \1,-8(%rsp)", text)
    text = re.sub(r"^pop (%\S+)$", r"movq 8(%rsp),\1", text)
    text = re.sub(r"0x[0-9a-f]+\(%rip\)", "64(%rip)", text)
    for wrong, right in _OF_CORE.get(core, ()):
        text = re.sub(wrong, right, text)
    return text


def simulator() -> str | None:
    """The llvm-mca to use, if there is one that is new enough."""
    for version in range(OLDEST + 20, OLDEST - 1, -1):
        if found := shutil.which(f"llvm-mca-{version}"):
            return found
    if plain := shutil.which("llvm-mca"):
        said = subprocess.run([plain, "--version"], capture_output=True, text=True, check=True)
        version = re.search(r"LLVM version (\d+)", said.stdout)
        if version and int(version[1]) >= OLDEST:
            return plain
    return None


def why_not() -> str | None:
    """Why nothing can be simulated here, or None."""
    if reason := ports.why_not():
        return reason
    return None if simulator() else f"needs llvm-mca of LLVM {OLDEST} or later"


def block(trace: Path, program: Path, isa: str, case: Case) -> list[int]:
    """The addresses of one block's instructions in their order, windows full and state not empty.

    Args:
        trace: the program of ``ports.tracer``.
        program: that of ``instructions.driver``.
        isa: the instruction set.
        case: a forward pass of one head, and of as many tokens as ``ports.CASES`` have.
    """
    order = [address for address, _ in ports.traced("order", trace, program, isa, case)]
    times = Counter(order)
    places: dict[int, list[int]] = {}
    for i, address in enumerate(order):
        if times[address] == case.T // BLOCK:  # once for each block, if not by chance
            places.setdefault(address, []).append(i)
    begin, end = max((at[-3:-1] for at in places.values()), key=lambda at: at[1] - at[0])
    return order[begin:end]


@dataclass
class Share:
    """Of a token and head."""

    cycles: float = 0.0  # in which the oldest instruction was one of these
    multiply_adds: float = 0.0
    instructions: float = 0.0


def simulate(
    addresses: list[int], of: dict[int, tuple[str, str]], core: str
) -> tuple[dict[str, Share], dict[str, float]]:
    """What ``core`` does with the instructions of a block.

    Args:
        addresses: of the instructions, in order.
        of: function and instruction at every address.
        core: an LLVM name, such as ``"znver3"``.

    Returns:
        The shares of the functions, and for how many cycles of a token and head each unit is taken.

    Raises:
        RuntimeError: llvm-mca refused; with what it said.
    """
    taken = [(of[a], text) for a in addresses if (text := assembly(of[a][1], core))]
    command = [str(simulator()), f"-mcpu={core}", "-iterations=1", "-json", "-timeline"]
    command += ["-timeline-max-iterations=1", f"-timeline-max-cycles={100 * len(taken)}"]
    done = subprocess.run(
        command,
        input="".join(f"{text}\n" for _, text in taken),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"llvm-mca: {done.stderr.strip()[:1000]}")
    report = json.loads(done.stdout)
    region = report["CodeRegions"][0]
    shares: dict[str, Share] = {}
    before = 0
    timeline = region["TimelineView"]["TimelineInfo"]
    for ((function, instruction), _), times in zip(taken, timeline, strict=True):
        share = shares.setdefault(function, Share())
        share.cycles += (times["CycleRetired"] - before) / BLOCK
        share.multiply_adds += instruction.startswith(("vfm", "vfnm", "vdpbf16")) / BLOCK
        share.instructions += 1 / BLOCK
        before = times["CycleRetired"]
    names = report["TargetInfo"]["Resources"]
    use = {
        names[u["ResourceIndex"]].partition(".")[0]: u["ResourceUsage"] / BLOCK
        for u in region["ResourcePressureView"]["ResourcePressureInfo"]
        if u["InstructionIndex"] == len(taken)  # the sum over all of them
    }
    return shares, use


def main() -> None:
    """Prints the cycles of every case."""
    parser = ports.make_parser("bench.cycles", __doc__, CASES)
    parser.add_argument(
        "--core", default="native", help="as LLVM names it: znver3, znver4, ...; default: this one"
    )
    options, cases = ports.chosen(parser, CASES, why_not())
    of = ports.disassembly(options.isa)
    with ports.tracer() as trace, driver("-DTRACED") as program:
        for case in cases:
            addresses = block(trace, program, options.isa, case)
            try:
                shares, use = simulate(addresses, of, options.core)
            except RuntimeError as error:  # of a core that LLVM does not know
                parser.exit(1, f"{parser.prog}: {error}\n")
            print(f"\n{case}, {options.isa} on {options.core}, per token and head")
            print(f"{'':44}{'cycles':>15}{'multiply adds':>15}{'instructions':>15}")
            total = Share(*map(sum, zip(*(vars(s).values() for s in shares.values()), strict=True)))
            rows = sorted(shares.items(), key=lambda row: -row[1].cycles)
            rows = [row for row in rows if row[1].cycles >= 0.005 * total.cycles]
            for function, share in [*rows, ("total", total)]:
                values = "".join(f"{value:15.1f}" for value in vars(share).values())
                print(f"{function[-43:]:44}{values}")
            busiest = sorted(use.items(), key=lambda unit: -unit[1])[:4]
            print("busiest units: " + ", ".join(f"{name} {cycles:.0f}" for name, cycles in busiest))


if __name__ == "__main__":
    main()
