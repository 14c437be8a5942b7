"""NVIDIA machine code: the listing and the resources of a cubin, by the tools that Triton ships."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .listing import Listing, read

_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>.*)"
)
_TARGET = re.compile(r"\((\.L_\w+)\)")


@dataclass(frozen=True)
class Cubin:
    """What ptxas made of a kernel."""

    text: str
    listing: Listing
    registers: int
    stack_bytes: int


def read_cubin(cubin: bytes) -> Cubin:
    usage, sass = _of_file(cubin, "cuobjdump", "--dump-resource-usage"), disassembled(cubin)
    amounts = {name: int(amount) for name, amount in re.findall(r"(\w+):(\d+)", usage)}
    return Cubin(sass, read_sass(sass), amounts["REG"], amounts["STACK"])


def disassembled(cubin: bytes, *, lines: bool = False) -> str:
    """The machine code of a cubin; with the source lines, if it has them."""
    return _of_file(cubin, "nvdisasm", *(("-gi",) if lines else ()), "-c")


def read_sass(text: str) -> Listing:
    return read(text.splitlines(), _LABEL, _INSTRUCTION, _branch_target)


def _branch_target(instruction: re.Match[str]) -> str | None:
    target = _TARGET.search(instruction["operands"])
    return target[1] if target and instruction["opcode"].startswith("BRA") else None


def _of_file(cubin: bytes, tool: str, *options: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (program, *options, file.name)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
