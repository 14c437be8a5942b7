"""Which implementation runs a call: asked for or the device's best, never a silent fallback."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import _C
from ._codes import ACTIVATIONS, WINDOW_KINDS
from ._sizes import check_size
from .case import Case
from .features import Features
from .launches import launches_of

OPS = (
    "feature_map",
    "linear_attention",
    "hybrid_attention",
    "hybrid_attention_step_",
    "attention_transfer",
)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_TRITON = (3, 7)  # the first whose functions return what is known at compile time
BY_DEVICE = "by device"  # no backend: torch finds one by the device of the tensors
MAX_DIM = 256  # D, V and f: the kernels' tiles of q, k, v and maps are at most this wide
FEW_TOKENS = 8  # of a decode step or a speculation; more are a prompt, work for tensor cores
NO_CUDA_KERNELS = (
    "this build has no CUDA kernels: lolcats_ops.cupy.install_launcher() compiles them with CuPy, "
    "and -DLOLCATS_CUDA=ON builds them in, with nvcc"
)


class Choice(NamedTuple):
    """The backend that runs a case, None if none does, and why."""

    backend: str | None
    why: str


@dataclass(frozen=True)
class Backend:
    """An implementation of all operators; ``why_not`` says why it cannot run a case, or None."""

    name: str
    device: str | None  # the device type whose default it is
    why_not: Callable[[Case], str | None]


def _kernel_limits(case: Case) -> str | None:
    if case.dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {_name(case.dtype)}"
    if (width := max(case.head_dim, case.value_dim)) > MAX_DIM:
        return f"its kernels take head dims up to {MAX_DIM}, not {width}"
    if case.feature_dim > MAX_DIM:
        return f"its kernels take maps up to {MAX_DIM} wide, not {case.feature_dim}"
    return None


def _cpu(case: Case) -> str | None:
    device = case.device.type
    if device != "cpu":
        return f"it runs on cpu, not on {device}"
    if _C.cpu_isa() is None:
        wanted, offered = os.environ.get("LOLCATS_ISA"), ", ".join(_C.cpu_isas())
        return f"LOLCATS_ISA is {wanted!r}, needs one of {offered}"
    return _kernel_limits(case)


def _cuda_limits(case: Case) -> str | None:
    """Those that no GPU can help."""
    return _kernel_limits(case) or launches_of(case).refusal


def _cuda(case: Case) -> str | None:
    if case.device.type != "cuda":
        return f"it runs on cuda, not on {case.device.type}"
    if reason := _cuda_limits(case):
        return reason
    if not _C.can_launch_cuda():
        return NO_CUDA_KERNELS
    if torch.version.hip:
        return "its kernels are for NVIDIA's GPUs"
    if not torch.cuda.is_available():
        return "this machine has no GPU"
    gpu = _gpu(case.device)
    if gpu.major < 8:
        return f"its kernels need compute capability 8.0, this GPU has {gpu.major}.{gpu.minor}"
    return launches_of(case, gpu.shared_memory_per_block_optin).refusal


def _gpu(device: torch.device) -> Any:
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def why_no_triton() -> str | None:
    """Why Triton's kernels cannot be compiled, whatever the case, or None."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if _triton_version() < OLDEST_TRITON:
        oldest, found = (".".join(map(str, n)) for n in (OLDEST_TRITON, _triton_version()))
        return f"its kernels need triton {oldest} or later, this is {found}"
    return None


@cache
def _triton_version() -> tuple[int, ...]:
    version = import_module("triton").__version__
    return tuple(int(number) for number in version.split(".")[:2])


def _triton(case: Case) -> str | None:
    device = case.device.type
    if find_spec("triton") is None:
        return why_no_triton()
    if device == "cuda" and not torch.cuda.is_available():
        return "this machine has no GPU"
    if device == "cpu" and (why := _not_interpreted(case.dtype)):
        return why
    if device not in ("cuda", "cpu"):
        return f"it runs on cuda, not on {device}"
    return why_no_triton() or _kernel_limits(case)


def _not_interpreted(dtype: torch.dtype) -> str | None:
    """Why Triton's kernels do not run on CPU tensors; None where its interpreter runs them."""
    triton = import_module("triton") if os.environ.get("TRITON_INTERPRET") else None
    if triton is None or not triton.knobs.runtime.interpret:
        return (
            "it runs on cuda, not on cpu; with TRITON_INTERPRET=1 it is interpreted, slowly, in "
            "float32 and float16"
        )
    interpreter = import_module("triton.runtime.interpreter")
    stock = type(interpreter.interpreter_builder) is interpreter.InterpreterBuilder
    if stock and dtype is torch.bfloat16:
        return "Triton's interpreter computes with the bits of bfloat16 as if they were integers"
    return None


_BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "cpu", _cpu),
        Backend("cuda", "cuda", _cuda),
        Backend("triton", "cuda", _triton),
        Backend("reference", None, lambda case: None),
    )
}


def backends() -> tuple[str, ...]:
    """The names that ``backend=`` takes.

    >>> backends()
    ('cpu', 'cuda', 'triton', 'reference')
    """
    return tuple(_BACKENDS)


def backend_for(op: str, *, backend: str | None = None, **case: Any) -> Choice:
    """Which backend would run ``op`` on a case, and why. Runs nothing.

    Args:
        op: the name of a public operator, such as "hybrid_attention".
        backend: the one that would be asked for; None for the best on the device.
        case: device, dtype, head_dim, value_dim, feature_dim (f; 0 where q and k are the features),
            activation, two_sided, tokens, window, window_kind, sink, key_padding_mask (whether
            there is one). What is not given is cpu, float32, 64, 64, 64, "softmax", True, 1, 64,
            "sliding", 0, False.

    Raises:
        ValueError: an unknown op, backend, device, activation or window_kind, or a size below 0,
            of q, k and v below 1.
        TypeError: an unknown case argument, or one of another type.

    >>> backend_for("hybrid_attention", dtype=torch.bfloat16)
    Choice(backend='cpu', why='cpu is the default on cpu')
    >>> backend_for("hybrid_attention", dtype=torch.float64).why
    "cpu: its kernels take float32, bfloat16 and float16, not float64; backend='reference' runs it"
    """
    if op not in OPS:
        raise ValueError(f"backend_for: op is {op!r}, needs one of {', '.join(OPS)}")
    return _choose(_case(op, case), backend)


def _case(op: str, given: dict[str, Any]) -> Case:
    """The case of ``op`` that was asked about."""
    names = [field.name for field in fields(Case)[1:]]
    if unknown := [name for name in given if name not in names]:
        raise TypeError(f"backend_for: no argument {unknown[0]!r}, needs {', '.join(names)}")
    try:
        device = torch.device(given.get("device", "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"backend_for: device is {given['device']!r}: {error}") from error
    case = Case(op, **{**given, "device": device})
    if not isinstance(case.dtype, torch.dtype):
        raise TypeError(f"backend_for: dtype is {case.dtype!r}, needs one of torch")
    for name, known in (("activation", ACTIVATIONS), ("window_kind", WINDOW_KINDS)):
        if (value := getattr(case, name)) not in known:
            raise ValueError(f"backend_for: {name} is {value!r}, needs one of {', '.join(known)}")
    for name in ("two_sided", "key_padding_mask"):
        if not isinstance(value := getattr(case, name), bool):
            raise TypeError(f"backend_for: {name} is {value!r}, needs a bool")
    least = {"head_dim": 1, "value_dim": 1, "feature_dim": 0, "tokens": 0, "window": 0, "sink": 0}
    for name, bound in least.items():
        check_size("backend_for", name, getattr(case, name), bound)
    return case


def select(
    op: str,
    backend: str | None,
    q: Tensor,
    v: Tensor | None = None,
    features: Features | None = None,
    **others: Any,
) -> str:
    """The backend that runs ``op`` on q and v with maps like ``features``; others: of a Case.

    Raises:
        ValueError: an unknown backend, or none that can run the case.
    """
    if torch.compiler.is_compiling() or isinstance(q, FakeTensor) or q.is_meta:
        _check_backend(op, backend)
        return backend or BY_DEVICE  # tracing needs shapes alone: no device, no kernels
    head_dim = q.shape[3]
    value_dim = head_dim if v is None else v.shape[3]
    maps = (0, "identity", False)
    if features is not None:
        maps = (features.width, features.activation, features.two_sided)
    case = Case(op, q.device, q.dtype, head_dim, value_dim, *maps, q.shape[2], **others)
    return chosen(case, backend)


def chosen(case: Case, backend: str | None = None) -> str:
    """The backend that runs a case.

    Raises:
        ValueError: an unknown backend, or none that can run it.
    """
    choice = _choose(case, backend)
    if choice.backend is None:
        raise ValueError(f"{case.op}: no backend for this case: {choice.why}")
    return choice.backend


def _choose(case: Case, name: str | None) -> Choice:
    _check_backend(case.op, name)
    if name is not None:
        reason = _BACKENDS[name].why_not(case)
        return Choice(name, "asked for") if reason is None else Choice(None, f"{name}: {reason}")
    reasons: list[str] = []
    for b in _best_first(case):
        if (reason := b.why_not(case)) is None:
            why = f"{b.name} is the default on {case.device.type}"
            return Choice(b.name, f"{why} ({'; '.join(reasons)})" if reasons else why)
        reasons.append(f"{b.name}: {reason}")
    why = "; ".join(reasons) or f"{case.device.type} has no kernels"
    if case.dtype.is_floating_point and case.dtype.itemsize > 1:  # torch computes in no others
        why += "; backend='reference' runs it"
    return Choice(None, why)


def _check_backend(op: str, name: str | None) -> None:
    if name is not None and name not in tuple(_BACKENDS):
        raise ValueError(f"{op}: backend is {name!r}, needs one of {', '.join(_BACKENDS)} or None")


def _best_first(case: Case) -> list[Backend]:
    """The backends of the case's device. Steps are faster in CUDA C++, all else in Triton, as
    measured on an H100 (docs/gpu_h100.md)."""
    found = [b for b in _BACKENDS.values() if b.device == case.device.type]
    is_step = case.op == "hybrid_attention_step_" and case.tokens <= FEW_TOKENS
    return sorted(found, key=lambda b: b.name == "cuda" and not is_step)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
