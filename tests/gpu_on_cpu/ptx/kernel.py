"""PtxKernel: compiled PTX as a function that runs, and checks itself, on the CPU."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from collections.abc import Sequence
from ctypes import c_int32
from typing import Any

from . import machine, memory
from .assembler import Assembler
from .describe import describe
from .errors import Fault, PtxError
from .parser import Parameter, parse
from .report import Access, Finding, Hazard, Report, Traffic

_MAX_FINDINGS = 256
_MAX_SHARED_BYTES = 227 * 1024
_MAX_THREADS = 1024


class PtxKernel:
    """An entry point of a PTX module.

    >>> kernel = PtxKernel(ptx)
    >>> report = kernel((blocks,), [x, y, n], shared_bytes=metadata.shared)
    >>> report.assert_clean()

    entry: its name, if there are several. Raises NotSupported with the text of the instruction, if
    there is one that this package does not know.
    """

    def __init__(self, ptx: str, entry: str | None = None):
        self.entry = parse(ptx, entry)
        self.program = Assembler(self.entry, machine.operations()).program()

    @property
    def name(self) -> str:
        return self.entry.name

    def __call__(
        self,
        grid: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        threads: int | Sequence[int] | None = None,
        check_races: bool = True,
        check_blocks: bool = False,
        order: int | None = None,
        max_instructions: int = 1 << 24,
    ) -> Report:
        """Runs all blocks, one after another.

        grid: blocks, up to three numbers.
        arguments: one per parameter: tensors or arrays in CPU memory, which are all that the kernel
            may touch; integers, floats, bytes for a struct, or a ``Struct`` that points to tensors,
            which then count as arguments after all others. Missing ones at the end are 0.
        shared_bytes: dynamic shared memory.
        threads: of a block, where the PTX does not say (.reqntid).
        check_races: shared memory and asynchronous operations.
        check_blocks: report bytes of global memory that one block stores and another one touches,
            unless both are atomics. Kernels that synchronise through locks are reported, too.
        order: a seed that shuffles the blocks, and the warps every few instructions. None: blocks
            in order, each warp as far as it gets.
        max_instructions: of the warps of a block together, before it counts as hanging.

        Raises Fault for what ends a kernel on a GPU, too: out of bounds, misaligned, deadlock.
        """
        if len(arguments) > len(self.entry.parameters):
            raise PtxError(f"{len(arguments)} arguments, {len(self.entry.parameters)} parameters")
        dynamic = self.entry.static_shared_bytes + shared_bytes
        if dynamic > _MAX_SHARED_BYTES:
            raise PtxError(f"{dynamic} bytes of shared memory, a block has {_MAX_SHARED_BYTES}")
        options = machine.Options(
            check_races,
            check_blocks,
            -1 if order is None else order,
            self._threads(threads),
            (c_int32 * 3)(*grid, *(1,) * (3 - len(grid))),
            dynamic,
            max_instructions,
        )
        return self._launch(options, arguments)

    def _threads(self, threads: int | Sequence[int] | None) -> ctypes.Array:
        if threads is None and self.entry.threads is None:
            raise PtxError(f"{self.name} does not say how many threads a block has")
        if threads is None:
            threads = self.entry.threads
        sizes = [threads] if isinstance(threads, int) else list(threads)
        if not 0 < math.prod(sizes) <= _MAX_THREADS:
            raise PtxError(f"{math.prod(sizes)} threads, a block has 1 to {_MAX_THREADS}")
        return (c_int32 * 3)(*sizes, *(1,) * (3 - len(sizes)))

    def _launch(self, options: machine.Options, arguments: Sequence[Any]) -> Report:
        inside = [
            tensor
            for argument in arguments
            if isinstance(argument, memory.Struct)
            for tensor in argument.pointers.values()
        ]
        ranges = memory.place([*arguments, *inside])
        parameters = self._pack(arguments, {r.argument: r.begin for r in ranges})
        counters = (machine.Counters * self.program.instructions)()
        traffic = (machine.Traffic * max(1, len(ranges)))()
        findings = (machine.Finding * _MAX_FINDINGS)()
        result = machine.Result(0, _MAX_FINDINGS, findings, traffic)
        failed = machine.load().ptx_launch(
            ctypes.byref(self.program),
            ctypes.byref(options),
            parameters,
            (machine.Range * max(1, len(ranges)))(*ranges),
            len(ranges),
            counters,
            ctypes.byref(result),
        )
        found = [self._finding(f) for f in findings[: min(result.findings, _MAX_FINDINGS)]]
        if failed:
            hazards = [f for f in found if f.hazard is not Hazard.DUPLICATE]  # which harm nobody
            raise Fault(self._fault_message(result), hazards)
        return Report(
            races=[f for f in found if f.hazard not in (Hazard.DUPLICATE, Hazard.BLOCKS)],
            duplicates=[f for f in found if f.hazard is Hazard.DUPLICATE],
            block_conflicts=[f for f in found if f.hazard is Hazard.BLOCKS],
            global_bytes={
                r.argument: Traffic(*(getattr(t, name) for name, _ in t._fields_))
                for r, t in zip(ranges, traffic, strict=False)
            },
            executed=[
                (statement.opcode, counter.executed)
                for statement, counter in zip(self.entry.statements, counters, strict=False)
            ],
            accesses=self._accesses(counters),
        )

    def _pack(self, arguments: Sequence[Any], addresses: dict[int, int]) -> bytes:
        end = max((p.offset + p.bytes for p in self.entry.parameters), default=0)
        buffer = bytearray(end + 8)
        inside = itertools.count(len(arguments))
        for index, parameter in enumerate(self.entry.parameters[: len(arguments)]):
            argument = addresses.get(index, arguments[index])
            if isinstance(argument, memory.Struct):
                argument = argument.placed([addresses[next(inside)] for _ in argument.pointers])
            packed = _packed(parameter, argument)
            buffer[parameter.offset : parameter.offset + len(packed)] = packed
        return bytes(buffer)

    def _text(self, pc: int) -> str:
        statements = self.entry.statements
        return str(statements[pc]) if 0 <= pc < len(statements) else "the end"

    def _fault_message(self, result: machine.Result) -> str:
        message = result.message.decode()
        if result.fault_pc < 0:
            return f"{self.name}: {message}, block {tuple(result.fault_block)}"
        return (
            f"{self.name}: {message}: {self._text(result.fault_pc)}, "
            f"block {tuple(result.fault_block)}, thread {result.fault_thread}"
        )

    def _finding(self, f: machine.Finding) -> Finding:
        hazard = list(Hazard)[f.hazard]
        message = describe(hazard, f, self._text)
        return Finding(hazard, message, self._text(f.pc), f.count)

    def _accesses(self, counters: Sequence[machine.Counters]) -> list[Access]:
        looped = self.entry.looped()
        return [
            Access(
                statement.text,
                statement.location,
                index in looped,
                c.requests,
                c.sectors,
                c.ideal_sectors,
                c.wavefronts,
                c.ideal_wavefronts,
            )
            for index, (statement, c) in enumerate(
                zip(self.entry.statements, counters, strict=False)
            )
            if c.requests
        ]


def _packed(parameter: Parameter, argument: Any) -> bytes:
    if isinstance(argument, bytes):
        if len(argument) != parameter.bytes:
            raise PtxError(f"{parameter.name} takes {parameter.bytes} bytes, got {len(argument)}")
        return argument
    if isinstance(argument, float):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[parameter.bytes], argument)
    bits = 8 * parameter.bytes
    if not -(1 << bits - 1) <= argument < 1 << bits:
        raise PtxError(f"{argument} does not fit into {parameter.name}, {bits} bits")
    return (int(argument) % (1 << bits)).to_bytes(parameter.bytes, "little")
