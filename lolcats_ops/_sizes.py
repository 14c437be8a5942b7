"""Sizes that are arguments, wherever they are."""

from numbers import Integral
from typing import Any

MOST = 2**63 - 1  # of an int64


def check_size(caller: str, name: str, size: Any, least: int) -> None:
    """Raises TypeError where a size is no integer, ValueError where it is less than ``least`` or no
    int64. Those of torch.compile, torch.SymInt, are the caller's to let pass."""
    is_integer = isinstance(size, Integral) and not isinstance(size, bool)
    if not is_integer:
        raise TypeError(f"{caller}: {name} is {size!r}, needs an integer")
    if size < least:
        raise ValueError(f"{caller}: {name} is {size}, needs >= {least}")
    if size > MOST:
        raise ValueError(f"{caller}: {name} is {size}, needs an int64")
