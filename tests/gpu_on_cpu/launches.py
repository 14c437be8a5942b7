"""Launches of Triton kernels as a GPU would run them: compiled, and their PTX executed on the CPU.

    triton.runtime.driver.set_active(driver_for("sm_90"))  # of compiler.py
    launch = bind(kernel, (blocks,), (q, k, v, o, T), {"num_warps": 4})  # not yet run
    launch.execute().assert_clean()  # now o has the results

Kernels are compiled, not interpreted: TRITON_INTERPRET must be 0 before triton is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .ptx import PtxKernel
from .ptx.report import Report

_kernel_of = lru_cache(maxsize=32)(PtxKernel)


@dataclass(frozen=True)
class Launch:
    """kernel[grid](arguments), compiled.

    arguments: what is left of them when constants are compiled in, by name; a member of a tuple is
        "tuple.member". Tensors are on the CPU.
    compiled: Triton's, with ``asm`` and ``metadata``.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    compiled: Any

    @property
    def tensors(self) -> dict[str, Any]:
        return {name: x for name, x in self.arguments.items() if hasattr(x, "data_ptr")}

    def execute(
        self, ptx: str = "", tensors: Mapping[str, Any] | None = None, **checks: Any
    ) -> Report:
        """Runs it; or other PTX, or on other tensors. checks: those of PtxKernel."""
        arguments = {**self.arguments, **(tensors or {})}
        kernel = _kernel_of(ptx or self.compiled.asm["ptx"])
        shared = self.compiled.metadata.shared
        return kernel(self.grid, list(arguments.values()), shared_bytes=shared, **checks)


def bind(kernel: Any, grid: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Launch:
    """Compiles kernel[grid](*arguments, **options) for Triton's active target.

    grid: up to three numbers, or a function of the arguments by name.
    """
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    kinds = compiled.src.signature
    own = {name: value for name, value in options.items() if name in kinds}
    bound = inspect.signature(kernel.fn).bind(*arguments, **own)
    bound.apply_defaults()
    named = {
        name: value
        for top, argument in bound.arguments.items()
        for name, value in _parameters(top, kinds[top], argument)
    }
    blocks = grid(bound.arguments) if callable(grid) else grid
    return Launch(kernel.fn.__name__, blocks, named, compiled)


def _parameters(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of the compiled kernel that an argument becomes; a tuple has kinds inside."""
    if isinstance(kind, tuple):
        members = getattr(value, "_fields", range(len(kind)))
        for member, part, x in zip(members, kind, value, strict=True):
            yield from _parameters(f"{name}.{member}", part, x)
    elif kind != "constexpr":
        yield name, value
