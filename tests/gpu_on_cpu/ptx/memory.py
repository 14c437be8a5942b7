"""Where tensor arguments lie, and the addresses at which a kernel sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PtxError
from .machine import Range

# Far apart: a wrong offset, even one that overflows 32 bits, does not reach another argument.
_APART = 1 << 40
# GPUs allocate at multiples of 256; so an address keeps where in its allocation it lies, for
# alignment and sectors, and not where the host has put that.
_KEPT = (1 << 16) - 1


@dataclass(frozen=True)
class Struct:
    """A struct by value: its bytes, and at which of them the address of a tensor belongs."""

    data: bytes
    pointers: Mapping[int, Any]

    def placed(self, addresses: Sequence[int]) -> bytes:
        """The bytes as the kernel sees them."""
        data = bytearray(self.data)
        for offset, address in zip(self.pointers, addresses, strict=True):
            data[offset : offset + 8] = address.to_bytes(8, "little")
        return bytes(data)


def place(arguments: Sequence[Any]) -> list[Range]:
    """The ranges of those arguments that are tensors or arrays, in their order.

    Arguments that overlap in memory, such as views of one tensor, overlap for the kernel, too.
    """
    spans = {
        index: span for index, a in enumerate(arguments) if (span := _span(index, a)) is not None
    }
    result, base, end = {}, 0, 0
    for number, index in enumerate(sorted(spans, key=spans.__getitem__), start=1):
        host, host_end, allocation = spans[index]
        if host >= end:  # disjoint from all before it
            base = number * _APART + (host - allocation & _KEPT) - host
        end = max(end, host_end)
        result[index] = Range(base + host, base + host_end, host, index)
    return [result[index] for index in sorted(result)]


def _span(index: int, argument: Any) -> tuple[int, int, int] | None:
    """From the first to the last element, and where what they lie in begins; None for what is no
    tensor."""
    if hasattr(argument, "data_ptr"):
        if argument.device.type != "cpu":
            raise PtxError(f"argument {index} is on {argument.device}, not on the CPU")
        begin, shape, itemsize = argument.data_ptr(), argument.shape, argument.element_size()
        strides = [stride * itemsize for stride in argument.stride()]
        allocation = argument.untyped_storage().data_ptr()
    elif hasattr(argument, "__array_interface__"):
        begin, shape = argument.__array_interface__["data"][0], argument.shape
        itemsize, strides = argument.itemsize, argument.strides
        allocation = _allocation_of(argument)
    else:
        return None
    if any(stride < 0 for stride in strides):
        raise PtxError(f"argument {index} has a negative stride")
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return begin, begin + last + itemsize if all(shape) else begin, allocation


def _allocation_of(array: Any) -> int:
    """Where the array begins that this one is a view of."""
    while hasattr(array.base, "__array_interface__"):
        array = array.base
    return array.__array_interface__["data"][0]
