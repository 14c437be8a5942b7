"""Checks of an interpreted launch: bounds always, races and program order within ``checked``.

**Bounds.** Each tensor argument lives in an address space of its own: a pointer carries the
argument's number above its 48 address bits, and pointer arithmetic leaves the number alone. A lane
that leaves its argument is therefore found even where it hits another one.

**Races** between programs: ``races``. The **order** of programs can be shuffled by a seed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .races import Conflict, RaceDetector

Program = tuple[int, int, int]

_ADDRESS_BITS = 48  # of user space on x86-64 and arm64
_ADDRESS = np.uint64((1 << _ADDRESS_BITS) - 1)


class OutOfBounds(Exception):
    """A lane accesses memory outside the argument that its pointer comes from."""


class Race(Exception):
    """Two programs access the same memory, one of them stores, and nothing orders them."""


@dataclass(frozen=True)
class Checks:
    """What a launch is checked for besides bounds."""

    races: bool = False
    order: int | None = None
    overflow: bool = False


_checks = Checks()


@contextlib.contextmanager
def checked(
    *, races: bool = False, order: int | None = None, overflow: bool = False
) -> Iterator[None]:
    """Checks of the launches within, besides bounds, which are checked everywhere.

    races: conflicting accesses of two programs raise ``Race``.
    order: programs run in a random order drawn from this seed, not in that of their numbers.
    overflow: 32-bit integers that overflow in + - * raise.
    """
    global _checks
    before, _checks = _checks, Checks(races, order, overflow)
    try:
        yield
    finally:
        _checks = before


@dataclass(frozen=True)
class Argument:
    """A tensor argument: the bytes from the first to behind the last that its view reaches."""

    name: str
    tag: int  # what its pointers carry above their address
    first: int  # address
    end: int
    element: int  # bytes

    @classmethod
    def of(cls, name: str, tag: int, tensor: torch.Tensor) -> Argument:
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; interpreted kernels take CPU tensors")
        element, elements = tensor.element_size(), 0
        if tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            elements = 1 + sum((size - 1) * stride for size, stride in steps)
        first = tensor.data_ptr()
        return cls(name, tag, first, first + elements * element, element)

    @property
    def tagged_first(self) -> int:
        return self.tag << _ADDRESS_BITS | self.first

    @property
    def tagged_end(self) -> int:
        return self.tag << _ADDRESS_BITS | self.end


class _Pointer:
    """Stands for a tensor where the interpreter asks for the address to start from."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class Launch:
    """One launch of a kernel: its arguments, its programs, and what they did to memory."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.checks = _checks
        self.arguments: list[Argument] = []
        self.program: Program = (0, 0, 0)
        self.grid: Program = (1, 1, 1)
        self.races: RaceDetector | None = None

    def adopt(self, name: str, value: Any) -> Any:
        """A launch argument with its tensors replaced by pointers into their address spaces."""
        if isinstance(value, tuple):
            items = [self.adopt(f"{name}[{i}]", item) for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, TensorDescriptor):
            rest = value.shape, value.strides, value.block_shape, value.padding
            base = self.adopt(name, value.base)
            return TensorDescriptor(base, *rest, value.round_f32_to_tf32)
        if not isinstance(value, torch.Tensor):
            return value
        argument = Argument.of(name, len(self.arguments) + 1, value)
        self.arguments.append(argument)
        return _Pointer(value.dtype, argument.tagged_first)

    def programs(self, grid: Program) -> Iterator[Program]:
        """The programs in the order in which they run: x fastest, or shuffled."""
        self.grid = grid
        count = grid[0] * grid[1] * grid[2]
        if self.checks.races:
            spans = ((a.first, a.end, a.element) for a in self.arguments)
            self.races = RaceDetector(spans, count)
        order = np.arange(count)
        if self.checks.order is not None:
            order = np.random.default_rng(self.checks.order).permutation(count)
        for number in order.tolist():
            self.program = self._coordinates(number)
            if self.races:
                self.races.start(number)
            yield self.program

    def _coordinates(self, number: int) -> Program:
        across, down, _ = self.grid
        return number % across, number // across % down, number // (across * down)

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """Checks the load and returns the addresses."""
        addresses, active = self._resolve("load", pointers, mask, size)
        if self.races and active.size:
            self._raise("load", self.races.load(active, size))
        return addresses

    def store(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """Checks the store and returns the addresses."""
        addresses, active = self._resolve("store", pointers, mask, size)
        if self.races and active.size:
            self._raise("store", self.races.store(active, size))
        return addresses

    def atomic(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, acquires: bool, releases: bool
    ) -> np.ndarray:
        """Checks the atomic operation and returns the addresses."""
        addresses, active = self._resolve("atomic", pointers, mask, size)
        if self.races and active.size:
            self._raise("atomic", self.races.atomic(active, size, acquires, releases))
        return addresses

    def _resolve(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int):
        """Addresses of all lanes, and of the active ones, which lie within their arguments."""
        mask = np.broadcast_to(mask, pointers.shape)
        active = pointers if mask.all() else pointers[mask]
        if active.size and not self._within_one_argument(active, size):
            self._check_lanes(what, active, size)
        return pointers & _ADDRESS, active & _ADDRESS if self.races else active

    def _within_one_argument(self, pointers: np.ndarray, size: int) -> bool:
        low, high = int(pointers.min()), int(pointers.max())
        tag = low >> _ADDRESS_BITS
        if not 1 <= tag <= len(self.arguments):
            return False
        argument = self.arguments[tag - 1]
        return argument.tagged_first <= low and high + size <= argument.tagged_end

    def _check_lanes(self, what: str, pointers: np.ndarray, size: int) -> None:
        """Lanes may point into several arguments: looks at each, raises for the worst."""
        tags = pointers >> np.uint64(_ADDRESS_BITS)
        for tag in np.unique(tags).tolist():
            if not 1 <= tag <= len(self.arguments):
                raise OutOfBounds(f"{self._place(what)}: the pointer stems from no argument")
            argument = self.arguments[tag - 1]
            addresses = (pointers[tags == tag] & _ADDRESS).astype(np.int64)
            before, behind = argument.first - addresses, addresses + size - argument.end
            outside = np.maximum(before, behind)
            if outside.max() > 0:
                where = "before its start" if before.max() > behind.max() else "past its end"
                raise OutOfBounds(
                    f"{self._place(what)}: {(outside > 0).sum()} of {pointers.size} active lanes "
                    f"outside {argument.name}, by up to {outside.max()} bytes {where}"
                )

    def _place(self, what: str) -> str:
        return f"{self.kernel}, program {self.program}, {what}"

    def _raise(self, what: str, conflict: Conflict | None) -> None:
        if conflict is None:
            return
        views = [a for a in self.arguments if a.first <= conflict.address < a.end]
        names = " and ".join(f"{a.name} at byte {conflict.address - a.first}" for a in views)
        other = self._coordinates(conflict.program)
        raise Race(
            f"{self._place(what)} of {names}: {conflict.access} there by program {other} "
            f"are not ordered before it by release and acquire"
        )
