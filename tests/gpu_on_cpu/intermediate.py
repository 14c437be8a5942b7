"""The program that Triton makes of a kernel before it turns to a GPU (TTIR), as a digest.

    digest_of(kernel, grid, arguments, {"num_warps": 4})  # for Triton's active target

A tenth of a compilation, whose outcome depends on nothing else but the target, the options and the
version of Triton. Programs that differ in names, or in where their source stands, are the same.
Kernels are not interpreted: TRITON_INTERPRET must be 0 before triton is imported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from triton import knobs

_PLACES = re.compile(r'^#loc.*\n?| loc\((?:[^()"]|"[^"]*"|\([^()]*\))*\)', re.MULTILINE)
_NAME = re.compile(r"%[\w$.-]+")


class _Made(Exception):
    """Ends a compilation; with what it had made."""


def digest(ttir: str) -> str:
    """Of the text of a program."""
    numbers: dict[str, str] = {}
    text = _NAME.sub(
        lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), _PLACES.sub("", ttir)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(kernel: Any, grid: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> str:
    """Of what kernel[grid](*arguments, **options) would compile, which stays uncompiled."""
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _end_after_ttir
    try:
        kernel.warmup(*arguments, grid=grid, **options)
    except _Made as made:
        return digest(made.args[0])
    finally:
        knobs.runtime.add_stages_inspection_hook = before
    raise RuntimeError(f"{kernel.fn.__name__} was compiled, or had been")


def _end_after_ttir(
    backend: Any = None, stages: dict[str, Callable] | None = None, *_: Any
) -> tuple[str, str] | None:
    """Triton's hook: without arguments it is asked for keys of its caches, for what it changes."""
    if stages is None:
        return (__name__,) * 2
    make_ttir = stages["ttir"]

    def end(source: Any, metadata: Any) -> None:
        raise _Made(str(make_ttir(source, metadata)))

    stages["ttir"] = end
    return None
