"""Which implementation runs a call: asked for or the device's best, never a silent fallback."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

OPS = (
    "feature_map",
    "linear_attention",
    "hybrid_attention",
    "hybrid_attention_step_",
    "attention_transfer",
)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256  # the kernels' tiles of q, k and v are at most this wide


class Choice(NamedTuple):
    """The backend that runs a case, None if none does, and why."""

    backend: str | None
    why: str


@dataclass(frozen=True)
class Case:
    """What decides which backend can run a call."""

    op: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    value_dim: int = 64


@dataclass(frozen=True)
class Backend:
    """An implementation of all operators; ``why_not`` says why it cannot run a case, or None."""

    name: str
    device: str | None  # the device type whose default it is
    why_not: Callable[[Case], str | None]


def _kernel_limits(case: Case) -> str | None:
    if case.dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {_name(case.dtype)}"
    if (width := max(case.head_dim, case.value_dim)) > MAX_HEAD_DIM:
        return f"its kernels take head dims up to {MAX_HEAD_DIM}, not {width}"
    return None


def _cpu(case: Case) -> str | None:
    return f"it runs on cpu, not on {case.device}" if case.device != "cpu" else _kernel_limits(case)


def _cuda(case: Case) -> str | None:
    if case.device != "cuda":
        return f"it runs on cuda, not on {case.device}"
    return "this build has no CUDA kernels"


def _triton(case: Case) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if case.device == "cuda" and not torch.cuda.is_available():
        return "this machine has no GPU"
    if case.device == "cpu" and not _is_interpreted():
        return "it runs on cuda, not on cpu; with TRITON_INTERPRET=1 it is interpreted, slowly"
    if case.device not in ("cuda", "cpu"):
        return f"it runs on cuda, not on {case.device}"
    return _kernel_limits(case)


def _is_interpreted() -> bool:
    """Whether Triton's kernels run on CPU tensors, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# Best first.
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
        case: device, dtype, head_dim, value_dim; what is not given is cpu, float32, 64, 64.

    Raises:
        ValueError: an unknown op or backend.
        TypeError: an unknown case argument.

    >>> backend_for("hybrid_attention", dtype=torch.bfloat16)
    Choice(backend='cpu', why='cpu is the default on cpu')
    >>> backend_for("hybrid_attention", dtype=torch.float64).why
    "cpu: its kernels take float32, bfloat16 and float16, not float64; backend='reference' runs it"
    """
    if op not in OPS:
        raise ValueError(f"backend_for: op is {op!r}, needs one of {', '.join(OPS)}")
    return _choose(
        Case(op, **{**case, "device": torch.device(case.get("device", "cpu")).type}), backend
    )


def select(op: str, backend: str | None, q: Tensor, v: Tensor | None = None) -> str:
    """The backend that runs ``op`` on q and v.

    Raises:
        ValueError: an unknown backend, or none that can run the case.
    """
    if backend is None and (torch.compiler.is_compiling() or isinstance(q, FakeTensor)):
        return "native"  # tracing needs shapes alone: a machine without the device will do
    value_dim = q.shape[-1] if v is None else v.shape[-1]
    choice = _choose(Case(op, q.device.type, q.dtype, q.shape[-1], value_dim), backend)
    if choice.backend is None:
        raise ValueError(f"{op}: no backend for this case: {choice.why}")
    return choice.backend


def _choose(case: Case, name: str | None) -> Choice:
    if name is not None and name not in _BACKENDS:
        raise ValueError(
            f"{case.op}: backend is {name!r}, needs one of {', '.join(_BACKENDS)} or None"
        )
    if name is not None:
        reason = _BACKENDS[name].why_not(case)
        return Choice(name, "asked for") if reason is None else Choice(None, f"{name}: {reason}")
    reasons = []
    for b in _BACKENDS.values():
        if b.device == case.device:
            if (reason := b.why_not(case)) is None:
                return Choice(b.name, f"{b.name} is the default on {case.device}")
            reasons.append(f"{b.name}: {reason}")
    why = "; ".join(reasons) or f"{case.device} has no kernels"
    return Choice(None, f"{why}; backend='reference' runs it")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
