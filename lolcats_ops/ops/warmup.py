"""Compiles ahead what a server's first requests would wait for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from .._libraries import load_torch_ops
from ..dispatch import backend_for
from ..features import Features, init_weight
from ..state import HybridState
from .attention_transfer import attention_transfer
from .feature_map import feature_map
from .hybrid_attention import hybrid_attention
from .hybrid_attention_step import hybrid_attention_step_
from .linear_attention import linear_attention


def warmup(
    *ops: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int | None = None,
    tokens: Sequence[int] = (1024,),
    head_dim: int = 64,
    value_dim: int | None = None,
    feature_dim: int | None = None,
    feature_q: Features | None = None,
    feature_k: Features | None = None,
    window: int = 64,
    window_kind: str = "sliding",
    sink: int = 0,
    slack: int = 0,
    affine: bool = False,
    padded: bool = False,
    transposed: bool = False,
    xent: bool = False,
    backward: bool = False,
    backend: str | None = None,
) -> tuple[str, ...]:
    """Loads the operators, and compiles the kernels that calls like these would launch.

    Triton's kernels are compiled, not launched; compiled code is kept in the process and in
    Triton's cache on disk. Those in CUDA C++ are launched, on zeros: where a launcher compiles them
    (``lolcats_ops.cupy``), it does so then. The CPU's are only loaded.

    Args:
        ops: names of public operators; none to load alone.
        tokens: lengths T. Triton compiles anew for T = 1, for multiples of 16 and for others, for
            numbers of chunks likewise, and where few heads are cut into segments: give lengths as
            will come. Of a step the number of states counts as well.
        batch, heads, kv_heads, head_dim, value_dim: of q, k and v. kv_heads None is heads,
            value_dim None is head_dim.
        feature_q, feature_k: the maps; None for two-sided softmax of ``feature_dim`` (None:
            head_dim) columns.
        window, window_kind, sink, affine: as in ``hybrid_attention``.
        slack: of decoding states, for whose rings kernels are compiled: that of your
            ``LolcatsCache``, if you make one.
        padded: calls will have a key_padding_mask.
        transposed: q, k and v will be views of [B, T, H, D], as in Hugging Face's models. Triton
            compiles for the distance between tokens.
        xent: as in ``attention_transfer``.
        backward: also the gradients, of those operators that have one.
        backend: None for the best on ``device``.

    Returns:
        The names of the compiled kernels. No other thread may launch kernels meanwhile.

    Raises:
        ValueError: an unknown operator, no length, or none of the backends can run the case.

    >>> warmup("hybrid_attention", "hybrid_attention_step_", dtype=torch.bfloat16, tokens=(1, 512))
    ()
    """
    if len(tokens) == 0:
        raise ValueError("warmup: tokens is empty, needs lengths")
    load_torch_ops()
    value_dim = value_dim or head_dim
    width = feature_dim or head_dim
    windows: dict[str, Any] = {"window": window, "window_kind": window_kind, "sink": sink}
    case = {"device": device, "dtype": dtype, "head_dim": head_dim, "value_dim": value_dim}
    case |= windows | {"key_padding_mask": padded}
    compiled: set[str] = set()

    def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device, requires_grad=backward)

    def rows(heads: int, length: int, width: int) -> Tensor:
        if transposed:
            return zeros(batch, length, heads, width).transpose(1, 2)
        return zeros(batch, heads, length, width)

    for op in ops:
        case |= {"feature_dim": width, "activation": "softmax", "two_sided": True}
        if (used := feature_q if op == "feature_map" else feature_k) is not None:
            case |= {"feature_dim": used.width, "activation": used.activation}
            case |= {"two_sided": used.two_sided}
        with _compiling() as names:
            for length in tokens:
                choice = backend_for(op, backend=backend, tokens=length, **case)
                if choice.backend is None:
                    raise ValueError(f"warmup: {op}: {choice.why}")
                if choice.backend not in ("cuda", "triton"):
                    continue
                weight = init_weight(heads, head_dim, width, device=device)
                weight.requires_grad_(backward)
                maps = feature_q or Features(weight), feature_k or Features(weight)
                q = rows(heads, length, head_dim)
                k, v = (rows(kv_heads or heads, length, n) for n in (head_dim, value_dim))
                gate = zeros(heads, kind=torch.float32)
                options: dict[str, Any] = {"affine": affine, "backend": backend}
                if padded:
                    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
                    options["key_padding_mask"] = mask
                out = _call(op, (q, k, v), maps, gate, windows, slack, xent, options)
                if backward and out is not None:
                    out.backward(torch.zeros_like(out))
        compiled |= names
    return tuple(sorted(compiled))


def _compiling() -> AbstractContextManager[set[str]]:
    """While Triton's kernels, should there be any, are compiled instead of launched."""
    if find_spec("triton") is None:
        return nullcontext(set())
    context = import_module("lolcats_ops.kernels.triton.launch").compiling()
    return cast(AbstractContextManager[set[str]], context)


def _call(
    op: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    maps: tuple[Features, Features],
    gate: Tensor,
    windows: dict[str, Any],
    slack: int,
    xent: bool,
    options: dict[str, Any],
) -> Tensor | None:
    """Calls ``op``; the result to differentiate, or None."""
    if op == "feature_map":
        return feature_map(qkv[0], maps[0], backend=options["backend"])
    if op == "linear_attention":
        own = {name: value for name, value in options.items() if name != "affine"}
        return linear_attention(*qkv, feature_q=maps[0], feature_k=maps[1], **own)
    settings = windows | options
    if op == "hybrid_attention":
        return hybrid_attention(*qkv, *maps, gate, **settings)
    q, k, v = (x.detach() for x in qkv)
    if op == "attention_transfer":
        loss = attention_transfer(q, k, v, *maps, gate, **settings, xent=xent)
        return loss.mse + loss.xent
    with torch.no_grad():
        state = HybridState.empty_for(k, v, maps[1], **windows, slack=slack)
        if "key_padding_mask" in options:  # the step itself takes none
            hybrid_attention(q, k, v, *maps, gate, **settings, state=state)
        else:
            hybrid_attention_step_(q, k, v, *maps, gate, state, **options)
    return None
