"""The raw operators, and what Python adds to them: fakes, autograd, vmap, autocast.

torch.ops.lolcats_ops is what is best on the device of the tensors, lolcats_ops_triton the Triton
kernels and lolcats_ops_cuda those in CUDA C++, whose gradients are Triton's. All have the same
schemas and get the same additions.

One pair of functions (setup_context, backward) serves two callers. Direct calls of torch.ops go
through torch.library.register_autograd; the public functions go through a torch.autograd.Function,
because torch.func.grad through register_autograd is broken in torch itself (2.13, 2.14), or past
autograd where nobody can ask for a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ..dispatch import BY_DEVICE
from . import default, triton
from .arguments import last_contiguous
from .validation import check_no_tangents

CUDA = "lolcats_ops_cuda"
NAMESPACES = (default.NAMESPACE, triton.NAMESPACE, CUDA)
_NAMESPACE_OF = {  # of what ``dispatch.select`` chooses
    BY_DEVICE: default.NAMESPACE,
    "cpu": default.NAMESPACE,
    "cuda": CUDA,
    "triton": triton.NAMESPACE,
}

SEQUENCES = ("x", "q", "k", "v")  # activations: what autocast casts
ROWS = (
    *SEQUENCES,
    "kv0",
    "ksum0",
    "key_padding_mask",
)  # arguments whose first dimension is the batch


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtype of an active torch.autocast, as matrix products are, which
    leave float64 alone."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # for validation to refuse
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    casts = (t.is_floating_point() and t.dtype is not torch.float64 for t in tensors)
    return tuple(t.to(dtype) if cast else t for t, cast in zip(tensors, casts, strict=True))


def operators(backend: str) -> Any:
    """The namespace of torch.ops that ``backend`` runs."""
    return getattr(torch.ops, _NAMESPACE_OF[backend])


def overloads(name: str) -> list[Any]:
    """The operator ``name`` of every namespace."""
    return [getattr(getattr(torch.ops, namespace), name).default for namespace in NAMESPACES]


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the shapes of the operator's results."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        for op in overloads(name):
            torch.library.register_fake(op._name, fake)
        return fake

    return register


def differentiable(
    name: str, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes the operator ``name`` differentiable, once. ``backward`` takes the namespace of
    operators to call, the context and the gradients.

    Returns:
        A call that torch.func can transform as well; its first argument is the backend.
    """
    functions: dict[Any, Any] = {}
    for op in overloads(name):
        namespace = triton.NAMESPACE if op.namespace == CUDA else op.namespace
        of_namespace = getattr(torch.ops, namespace)
        gradient = _of(backward, of_namespace)
        torch.library.register_autograd(op._name, gradient, setup_context=setup_context)
        once = _once(name, getattr(of_namespace, f"{name}_backward").default)
        members = {
            "forward": staticmethod(_forward(op)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(_of(backward, SimpleNamespace(**{f"{name}_backward": once}))),
            "generate_vmap_rule": True,
        }
        functions[op] = type(name, (torch.autograd.Function,), members)
    for op in overloads(f"{name}_backward"):
        torch.library.register_autograd(op._name, _refusal(name))

    def call(backend: str, *args: Any) -> Any:
        op = getattr(operators(backend), name).default
        check_no_tangents(name, *args)
        # A compiler traces the operator itself: one node, differentiable by register_autograd.
        if torch.compiler.is_compiling():
            if _is_differentiated():
                torch._dynamo.graph_break("torch.func transforms operators eagerly")
            return op(*args)
        with refusals_of(name):
            function = functions[op]
            return (function.apply if _may_need_gradient(args) else function.forward)(*args)

    return call


def _is_differentiated() -> bool:
    """Whether this runs within a transform of torch.func that differentiates."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != TransformType.Vmap for level in levels)


# torch.compiler.assume_constant_result, without the import of the compiler: what is compiled is
# guarded by the transforms around it.
_is_differentiated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _may_need_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd or a transform of torch.func could ask for one."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


class refusals_of:
    """Turns a kernel's refusal, which torch raises as RuntimeError, into the ValueError that
    Python's own checks raise."""

    def __init__(self, name: str):
        self.name = name.rstrip("_")

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if kind is RuntimeError and str(error).startswith(f"{self.name}: "):
            raise ValueError(str(error)) from error


def _of(backward: Callable[..., Any], operators: Any) -> Callable[..., Any]:
    """``backward`` by ``operators``: a function, since compiled autograd takes no partial."""

    def gradient(ctx: Any, *gradients: Tensor | None) -> Any:
        return backward(operators, ctx, *gradients)

    return gradient


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise NotImplementedError(
            f"{name}: the kernels have no second-order gradients; backend='reference' has them"
        )

    return refuse


def _once(name: str, op: Any) -> Callable[..., Any]:
    """The gradient ``op`` of the operator ``name``, for torch.autograd.Function: what is
    differentiated once more is refused, which torch would take for a constant."""
    members = {
        "forward": staticmethod(_forward(op)),
        "setup_context": staticmethod(lambda ctx, inputs, output: None),
        "backward": staticmethod(_refusal(name)),
        "generate_vmap_rule": True,
    }
    function: Any = type(f"{name}_backward", (torch.autograd.Function,), members)
    return lambda *args: function.apply(*args) if torch.is_grad_enabled() else op(*args)


def _forward(op: Any) -> Callable[..., Any]:
    """``op`` without a gradient, past what torch.library.register_autograd has put in front of it,
    7 us; with its signature at hand: torch.autograd.Function asks for it in every call, and to find
    an operator's takes 40 us."""

    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def register_vmap(name: str, *, rows: bool = False) -> None:
    """vmap of the operator ``name``, as a loop.

    With ``rows`` (all outputs lead with the batch), as a larger batch where only rows are mapped.
    """
    for op in overloads(name):
        torch.library.register_vmap(op._name, _vmap_rule(op, name, rows))


def _vmap_rule(op: Any, name: str, rows: bool) -> Callable[..., tuple[Any, Any]]:
    names = [a.name for a in op._schema.arguments]
    mutated = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if size == 0:
            return _of_no_samples(op, in_dims, args)
        mapped = [n for n, dim in zip(names, in_dims, strict=True) if dim is not None]
        packed = any(n == "cu_seqlens" and a is not None for n, a in zip(names, args, strict=True))
        if rows and not packed and set(mapped) <= set(ROWS):
            flat = [
                _merge(n, a, dim, size) if n in ROWS and a is not None else a
                for n, dim, a in zip(names, in_dims, args, strict=True)
            ]
            return _structure(op(*flat), lambda y: y.unflatten(0, (size, y.shape[0] // size)))
        for n, dim, writes in zip(names, in_dims, mutated, strict=True):
            if writes and dim is None:
                raise ValueError(f"{name}: vmap needs {n}, which is written, to be mapped as well")
        args = tuple(
            a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, in_dims, strict=True)
        )
        # Copies of what is written as well: a sample that is refused leaves all as they were.
        own = tuple(
            a if dim is None else a.clone(memory_format=torch.contiguous_format)
            for a, dim in zip(args, in_dims, strict=True)
        )
        results = [
            op(*(a if dim is None else a[i] for a, dim in zip(own, in_dims, strict=True)))
            for i in range(size)
        ]
        for a, changed, writes in zip(args, own, mutated, strict=True):
            if writes:
                a.copy_(changed)
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def _of_no_samples(op: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """What of the results of one sample, of zeros, no samples have."""
    sample = [
        a if dim is None else a.new_zeros(a.movedim(dim, 0).shape[1:])
        for a, dim in zip(args, in_dims, strict=True)
    ]
    return _structure(op(*sample), lambda y: y.new_empty(0, *y.shape))


def _merge(name: str, x: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of x, or ``size`` copies of an unmapped x, merged into its batch."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    x = x.flatten(0, 1)
    return last_contiguous(x) if name in SEQUENCES else x.contiguous()


def _structure(outputs: Any, f: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    if isinstance(outputs, Tensor):
        return f(outputs), 0
    return tuple(map(f, outputs)), (0,) * len(outputs)


def register_autocast(name: str) -> None:
    """torch.autocast for calls of torch.ops: activations are cast, parameters stay fp32."""
    for op, library in zip(overloads(name), _libraries, strict=True):
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(name, _autocast_kernel(op, key), key)


def _autocast_kernel(op: Any, key: str) -> Callable[..., Any]:
    casts = [a.name in SEQUENCES for a in op._schema.arguments]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any) -> Any:
        # Before the guard, which makes autocast look disabled.
        cast = [autocast(a)[0] if c else a for a, c in zip(args, casts, strict=False)]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    return call


_libraries = [torch.library.Library(namespace, "FRAGMENT") for namespace in NAMESPACES]
