"""The implementations by name, what each can run, and why it cannot run the rest."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import lolcats_ops as lo
from lolcats_ops import _C

from . import eager, sequential
from .cases import Case
from .inputs import Inputs

Prepare = Callable[[Inputs], Callable[[], Any]]  # what is timed, on arguments made beforehand
PAIRS_LIMIT = 8192 * 8192  # of T x T matrices, four of which are 1 GB


@dataclass(frozen=True)
class Peer:
    """One implementation: for each operator, or "step", how to prepare a call.

    ``computes`` is what its output is checked against: the operator, or softmax attention of the
    same q, k, v.
    """

    about: str
    prepare: Mapping[str, Prepare]
    computes: str = "operator"
    why_not: Callable[[Case, str], str | None] = lambda case, device: None
    device: str | None = None  # the only one it runs on
    isa: str | None = None  # ours alone: the instruction set of CPUs to use
    built_for: str = ""  # what its own code is compiled for, if neither ours nor torch's
    threads: int = 0  # 0: as many as the run has
    compiled: bool = False  # for every shape anew: too slow to check on small shapes

    def refusal(self, case: Case, device: str) -> str | None:
        """Why it cannot run a case on a device, or None."""
        if kind(case) not in self.prepare:
            return f"has no {kind(case)}"
        if self.device not in (None, device):
            return f"runs on {self.device}, not on {device}"
        return self.why_not(case, device)


def kind(case: Case) -> str:
    """Which call of a peer runs a case."""
    return "step" if case.pass_ == "step" else case.op


@cache
def peers() -> dict[str, Peer]:
    """All implementations, our own first. Made once: what is timed changes the instruction set."""
    best = _C.cpu_isa()
    ours = operators_of(lo)
    quadratic = {"hybrid_attention": lambda x: partial(eager.quadratic, *_hybrid(x))}
    chunkwise: dict[str, Prepare] = {
        "hybrid_attention": lambda x: partial(eager.chunkwise, *_hybrid(x)),
        "linear_attention": lambda x: partial(eager.linear_chunkwise, x.q, x.k, x.v),
        "attention_transfer": lambda x: partial(eager.transfer_loss, *_hybrid(x)),
    }
    loop: dict[str, Prepare] = {
        "hybrid_attention": lambda x: partial(eager.chunk_by_chunk, *_hybrid(x)),
        "linear_attention": lambda x: partial(eager.linear_chunk_by_chunk, x.q, x.k, x.v),
    }
    features: dict[str, Prepare] = {
        "feature_map": lambda x: partial(eager.feature_map, x.q, x.tensors["weight_q"])
    }
    softmax: dict[str, Prepare] = {"hybrid_attention": _sdpa, "step": _sdpa_step}
    product: dict[str, Prepare] = {
        "linear_attention": lambda x: partial(sequential.linear_attention, x.q, x.k, x.v)
    }
    named = {
        "lolcats": Peer("this library", ours, isa=best),
        "lolcats_op": Peer(
            "its torch.ops without the Python function", {"step": _raw_step}, isa=best
        ),
        "lolcats_c": Peer(
            "its C library on NumPy arrays, without torch's dispatcher",
            {"step": _array_step},
            why_not=_no_array,
            device="cpu",
            isa=best,
        ),
        "reference": Peer(
            "lolcats_ops.reference", operators_of(lo.reference), why_not=_stores_pairs
        ),
        "eager": Peer("plain torch", features),
        "quadratic": Peer("as published, eager torch", quadratic, why_not=_stores_pairs),
        "chunkwise": Peer("in chunks, eager torch", chunkwise, why_not=_whole_chunks),
        "loop": Peer("one chunk after another, eager torch", loop, why_not=_forward_chunks),
        "sequential": Peer(
            "fast-transformers' algorithm in C",
            product,
            why_not=_sequential,
            device="cpu",
            built_for=platform.machine(),
        ),
        "sdpa": Peer("torch's softmax attention", softmax, computes="softmax"),
        "flex": Peer(
            "FlexAttention, causal",
            {"hybrid_attention": _flex},
            computes="softmax",
            why_not=_flex_limits,
            compiled=True,
        ),
        "fla": Peer(
            "flash-linear-attention",
            {"linear_attention": _fla},
            why_not=lambda case, device: _not_installed("fla"),
            device="cuda",
        ),
        "mamba": Peer(
            "Mamba-2's chunk scan without decay",
            {"linear_attention": _mamba},
            why_not=lambda case, device: _not_installed("mamba_ssm"),
            device="cuda",
        ),
    }
    named["lolcats:one_thread"] = Peer(
        "this library, one thread", ours, device="cpu", isa=best, threads=1
    )
    for isa in _C.cpu_isas():
        named[f"lolcats:{isa}"] = Peer(f"this library, {isa}", ours, device="cpu", isa=isa)
    for backend in ("cuda", "triton"):
        named[f"lolcats:{backend}"] = _on_backend(backend)
    for name in ("lolcats", "lolcats:cuda", "lolcats:triton", "sdpa"):
        named[f"graph:{name}"] = _graphed(named[name])
    for name in ("eager", "quadratic", "chunkwise"):
        named[f"compiled:{name}"] = _compiled(named[name])
    return named


def find(name: str) -> Peer:
    """The implementation of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in peers():
        raise ValueError(f"no implementation {name!r}")
    return peers()[name]


# Ours and the reference


def operators_of(module: Any, **options: Any) -> dict[str, Prepare]:
    """Of lolcats_ops or its reference, with ``options`` in every call."""

    """The operators of lolcats_ops, or of its reference."""

    def linear(x: Inputs) -> Callable[[], Any]:
        maps = dict(zip(("feature_q", "feature_k"), x.maps or (), strict=False))
        return partial(module.linear_attention, x.q, x.k, x.v, **maps, **options)

    def windowed(op: Callable[..., Any]) -> Prepare:
        return lambda x: partial(
            op, x.q, x.k, x.v, *x.maps, x.gate, window=x.case.window, **options
        )

    def step(x: Inputs) -> Callable[[], Any]:
        inputs = (x.q, x.k, x.v, *x.maps, x.gate, x.state)
        return partial(module.hybrid_attention_step_, *inputs, **options)

    def losses(x: Inputs) -> Callable[[], Any]:
        call = windowed(module.attention_transfer)(x)
        return lambda: call()[:2]

    return {
        "feature_map": lambda x: partial(module.feature_map, x.q, x.maps[0], **options),
        "linear_attention": linear,
        "hybrid_attention": windowed(module.hybrid_attention),
        "attention_transfer": losses,
        "step": step,
    }


def _on_backend(backend: str) -> Peer:
    def why_not(case: Case, device: str) -> str | None:
        op = "hybrid_attention_step_" if case.pass_ == "step" else case.op
        choice = lo.backend_for(
            op,
            backend=backend,
            device=device,
            dtype=getattr(torch, case.dtype),
            head_dim=case.D,
            value_dim=case.V,
            feature_dim=case.f,
            tokens=1 if case.pass_ == "step" else case.T,
            window=case.window,
        )
        return None if choice.backend else choice.why

    about = f"this library, backend {backend}"
    return Peer(about, operators_of(lo, backend=backend), why_not=why_not, device="cuda")


def _graphed(peer: Peer) -> Peer:
    """Its step captured as a CUDA graph, so that the kernels of a step are one launch."""

    def captured(x: Inputs) -> Callable[[], Any]:
        call = peer.prepare["step"](x)
        before = None if x.state is None else x.state.clone()
        call()  # compiles, which a capture does not allow
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        if x.state is not None and before is not None:
            for name, tensor in before.tensors.items():
                x.state.tensors[name].copy_(tensor)

        def replay() -> Any:
            graph.replay()
            return out

        return replay

    return Peer(
        f"{peer.about}, as a CUDA graph",
        {"step": captured},
        computes=peer.computes,
        why_not=peer.why_not,
        device="cuda",
    )


def _step_arguments(x: Inputs) -> tuple[Any, ...]:
    """Of the operator, by its schema."""
    assert x.state is not None
    maps = (x.tensors["weight_q"], None, x.tensors["weight_k"], None)
    settings = (x.case.window, 0, x.case.D**-0.5, False, *x.maps[0].codes)
    state = x.state.tensors.values()
    return (x.q, x.k, x.v, *maps, x.gate, *state, None, None, None, *settings)


def _raw_step(x: Inputs) -> Callable[[], Any]:
    return partial(torch.ops.lolcats_ops.hybrid_attention_step_.default, *_step_arguments(x))


def _array_step(x: Inputs) -> Callable[[], Any]:
    arguments = [a.numpy() if isinstance(a, Tensor) else a for a in _step_arguments(x)]
    return lambda: torch.from_numpy(_C.hybrid_attention_step_(*arguments))


def _no_array(case: Case, device: str) -> str | None:
    return "NumPy has no bfloat16" if case.dtype == "bfloat16" else None


# Plain torch


def _hybrid(x: Inputs) -> tuple[Any, ...]:
    return x.q, x.k, x.v, *map(x.tensors.get, ("weight_q", "weight_k")), x.gate, x.case.window


def _stores_pairs(case: Case, device: str) -> str | None:
    if case.B * case.H * case.T**2 > PAIRS_LIMIT:
        return f"stores matrices of {case.B} x {case.H} x {case.T} x {case.T}"
    return _equal_heads(case)


def _whole_chunks(case: Case, device: str) -> str | None:
    if not case.window:
        return None if case.T % 64 == 0 else "takes chunks of 64 tokens"
    if case.T % case.window:
        return f"takes chunks of w={case.window} tokens, not T={case.T}"
    return _equal_heads(case)


def _forward_chunks(case: Case, device: str) -> str | None:
    if case.pass_ != "forward" or case.dtype != "float32":
        return "works in place, in fp32: forward alone"
    return _whole_chunks(case, device)


def _equal_heads(case: Case) -> str | None:
    return None if case.Hk == case.H else "takes as many key/value heads as query heads"


def _compiled(peer: Peer) -> Peer:
    def compile_call(prepare: Prepare) -> Prepare:
        def compiled(x: Inputs) -> Callable[[], Any]:
            call = prepare(x)
            assert isinstance(call, partial)
            return partial(torch.compile(call.func, dynamic=False), *call.args)

        return compiled

    return Peer(
        f"{peer.about}, torch.compile",
        {op: compile_call(prepare) for op, prepare in peer.prepare.items()},
        why_not=lambda case, device: _no_compiler() or peer.why_not(case, device),
        compiled=True,
    )


def _no_compiler() -> str | None:
    return None if shutil.which("g++") or shutil.which("clang++") else "needs a C++ compiler"


# Softmax attention


def _sdpa(x: Inputs) -> Callable[[], Tensor]:
    grouped = x.case.Hk != x.case.H
    return partial(scaled_dot_product_attention, x.q, x.k, x.v, is_causal=True, enable_gqa=grouped)


def _sdpa_step(x: Inputs) -> Callable[[], Tensor]:
    """One query against a cache of T tokens, of which the new token is written first."""
    grouped = x.case.Hk != x.case.H
    keys, values = x.cache()

    def step() -> Tensor:
        keys[:, :, -1:] = x.k
        values[:, :, -1:] = x.v
        return scaled_dot_product_attention(x.q, keys, values, enable_gqa=grouped)

    return step


def _flex(x: Inputs) -> Callable[[], Any]:
    T = x.case.T
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=str(x.q.device))
    return partial(torch.compile(flex_attention, dynamic=False), x.q, x.k, x.v, block_mask=mask)


def _flex_limits(case: Case, device: str) -> str | None:
    if case.pass_ != "forward" and device == "cpu":
        return "has no backward pass on CPUs"
    return _no_compiler() or _equal_heads(case)


# Linear attention elsewhere


def _sequential(case: Case, device: str) -> str | None:
    if case.f or case.dtype != "float32" or case.pass_ != "forward":
        return "the C loop takes fp32 features, forward"
    if sequential.compiler() is None:
        return "needs a C compiler"
    return _equal_heads(case)


def _not_installed(name: str) -> str | None:
    return f"{name} is not installed" if find_spec(name) is None else None


def _fla(x: Inputs) -> Callable[[], Any]:
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = (t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v))
    return lambda: chunk_linear_attn(q, k, v, scale=1.0)[0].transpose(1, 2)


def _mamba(x: Inputs) -> Callable[[], Any]:
    """y_t = C_t . sum of B_j x_j^T, with a column of ones for the denominator."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    c, b, v = (t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v))
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    step = torch.ones(v.shape[:3], device=v.device)
    decay = torch.zeros(v.shape[2], device=v.device)

    def scan() -> Tensor:
        y = mamba_chunk_scan_combined(values, step, decay, b, c, 256)
        return (y[..., :-1] / (y[..., -1:] + 1e-12)).transpose(1, 2)

    return scan
