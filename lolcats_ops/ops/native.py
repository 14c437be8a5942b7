"""The raw operators of the torch shim, and what Python adds to them: autograd, vmap, autocast.

One pair of functions (setup_context, backward) serves two callers. Direct calls of torch.ops go
through torch.library.register_autograd; the public functions go through a torch.autograd.Function,
because torch.func.grad through register_autograd is broken in torch itself (2.13, 2.14).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._native import load_torch_ops
from .arguments import last_contiguous

load_torch_ops()
raw = torch.ops.lolcats_ops

SEQUENCES = ("x", "q", "k", "v")  # activations: what autocast casts
ROWS = (
    *SEQUENCES,
    "kv0",
    "ksum0",
    "key_padding_mask",
)  # arguments whose first dimension is the batch


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtype of an active torch.autocast, as matrix products are."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # for validation to refuse
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes torch.ops.lolcats_ops.<name> differentiable.

    Returns:
        A call that torch.func can transform as well.
    """
    op = getattr(raw, name).default
    torch.library.register_autograd(op._name, backward, setup_context=setup_context)
    namespace = {
        "forward": staticmethod(op),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type(name, (torch.autograd.Function,), namespace)

    def call(*args: Any) -> Any:
        # A compiler traces the operator itself: one node, differentiable by register_autograd.
        return op(*args) if torch.compiler.is_compiling() else function.apply(*args)

    return call


def register_vmap(name: str, *, rows: bool = False) -> None:
    """vmap of torch.ops.lolcats_ops.<name>, as a loop.

    With ``rows`` (all outputs lead with the batch), as a larger batch where only rows are mapped.
    """
    op = getattr(raw, name).default
    names = [a.name for a in op._schema.arguments]
    mutated = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        mapped = [n for n, dim in zip(names, in_dims, strict=True) if dim is not None]
        packed = any(n == "cu_seqlens" and a is not None for n, a in zip(names, args, strict=True))
        if rows and not packed and set(mapped) <= set(ROWS):
            flat = [
                _merge(a, dim, size) if n in ROWS and a is not None else a
                for n, dim, a in zip(names, in_dims, args, strict=True)
            ]
            return _structure(op(*flat), lambda y: y.unflatten(0, (size, y.shape[0] // size)))
        for n, dim, writes in zip(names, in_dims, mutated, strict=True):
            if writes and dim is None:
                raise ValueError(f"{name}: vmap needs {n}, which is written, to be mapped as well")
        args = tuple(
            a if dim is None else a.movedim(dim, 0) if writes else a.movedim(dim, 0).contiguous()
            for a, dim, writes in zip(args, in_dims, mutated, strict=True)
        )
        results = [
            op(*(a if dim is None else a[i] for a, dim in zip(args, in_dims, strict=True)))
            for i in range(size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    torch.library.register_vmap(op._name, rule)


def _merge(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of x, or ``size`` copies of an unmapped x, merged into its batch."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return last_contiguous(x.flatten(0, 1))


def _structure(outputs: Any, f: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    if isinstance(outputs, Tensor):
        return f(outputs), 0
    return tuple(map(f, outputs)), (0,) * len(outputs)


def register_autocast(name: str) -> None:
    """torch.autocast for calls of torch.ops: activations are cast, parameters stay fp32."""
    op = getattr(raw, name).default
    casts = [a.name in SEQUENCES for a in op._schema.arguments]

    def kernel(key: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def call(*args: Any) -> Any:
            # Before the guard, which makes autocast look disabled.
            cast = [autocast(a)[0] if c else a for a, c in zip(args, casts, strict=False)]
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*cast)

        return call

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, kernel(key), key)


_library = torch.library.Library("lolcats_ops", "FRAGMENT")
