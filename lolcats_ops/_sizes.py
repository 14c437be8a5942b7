"""Sizes that are arguments, wherever they are."""

from numbers import Integral
from typing import Any


def check_size(caller: str, name: str, size: Any, least: int) -> None:
    """Raises TypeError where a size is no integer, ValueError where it is less than ``least``."""
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"{caller}: {name} is {size!r}, needs an integer")
    if size < least:
        raise ValueError(f"{caller}: {name} is {size}, needs at least {least}")
