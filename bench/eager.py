"""The formulations of SPEC in plain torch, as they were published and as one would write them.

Written apart from ``lolcats_ops.reference``, which they are also a check of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """SPEC 1, two-sided softmax: [B, H, T, D] -> [B, H, T, 2f]."""
    z = torch.einsum("bhtd,hdf->bhtf", x, weight.to(x.dtype))
    return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1).clamp(min=1e-12)


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, gate: Tensor, window: int
) -> Tensor:
    """SPEC 3 as published: two T x T matrices of weights, masked, added and normalised."""
    T = q.shape[2]
    ones = torch.ones(T, T, dtype=torch.bool, device=q.device)
    inside = ones.tril() & ~ones.tril(-window)
    outside = ones.tril(-window)
    g = gate.sigmoid()[:, None, None]
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~inside, -1e10)
    near = g * (scores - scores.amax(-1, keepdim=True)).exp()
    far = torch.einsum("bhif,bhjf->bhij", feature_map(q, weight_q), feature_map(k, weight_k))
    far = far.masked_fill(~outside, 0)
    weights = (near + far) / (near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True))
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, gate: Tensor, window: int
) -> Tensor:
    """SPEC 3 in chunks of w tokens; T a multiple of w.

    Token i of a chunk attends by softmax to tokens j > i of the chunk before and j <= i of its own;
    by features to j <= i of the chunk before and to all earlier chunks, of which a state is kept.
    """
    B, H, T, _ = q.shape
    chunks = (B, H, T // window, window, -1)
    phi_q = feature_map(q, weight_q).view(chunks)
    phi_k = feature_map(k, weight_k).view(chunks)
    q, k, v = q.view(chunks), k.view(chunks), _with_ones(v).view(chunks)
    lower = torch.ones(window, window, dtype=torch.bool, device=q.device).tril()

    near = torch.cat(
        [
            (q @ _previous(k).mT).masked_fill(lower, -1e10),
            (q @ k.mT).masked_fill(~lower, -1e10),
        ],
        -1,
    ) * (q.shape[-1] ** -0.5)
    near[:, :, 0, :, :window] = -1e10  # nothing comes before the first chunk
    near = gate.sigmoid()[:, None, None, None] * (near - near.amax(-1, keepdim=True)).exp()
    far = (phi_q @ _previous(phi_k).mT).masked_fill(~lower, 0)
    state = _previous(_previous((phi_k.mT @ v).cumsum(2)))
    out = near[..., :window] @ _previous(v) + near[..., window:] @ v + far @ _previous(v)
    out = out + phi_q @ state
    return (out[..., :-1] / out[..., -1:]).reshape(B, H, T, -1)


def chunk_by_chunk(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, gate: Tensor, window: int
) -> Tensor:
    """The same, one chunk after another, for its tiles to stay in the caches; in place, so that
    autograd cannot follow."""
    phi_q, phi_k = (feature_map(x, w).flatten(0, 1) for x, w in ((q, weight_q), (k, weight_k)))
    shape, g = v.shape, gate.sigmoid().repeat(q.shape[0])[:, None, None]
    q, k, v = (q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    kv, ksum = (
        phi_k.new_zeros(*phi_k.shape[::2], v.shape[-1]),
        phi_k.new_zeros(*phi_k.shape[::2], 1),
    )
    lower = torch.ones(window, window, device=q.device).tril()
    hidden = torch.cat([lower, 1 - lower], 1).bool()  # of the chunk before, and of its own
    out = torch.empty_like(v)
    for i in range(0, q.shape[1], window):
        j, end = max(0, i - window), i + window
        weights = torch.bmm(q[:, i:end], k[:, j:end].mT)
        weights.masked_fill_(hidden[:, window - (i - j) :], -torch.inf)
        weights.sub_(weights.amax(-1, keepdim=True)).exp_().mul_(g)
        if i:
            weights[..., :window] += torch.bmm(phi_q[:, i:end], phi_k[:, j:i].mT).mul_(lower)
        den = weights.sum(-1, keepdim=True)
        num = torch.bmm(weights, v[:, j:end])
        if i > window:
            num.baddbmm_(phi_q[:, i:end], kv)
            den.baddbmm_(phi_q[:, i:end], ksum)
        out[:, i:end] = num.div_(den)
        if i:
            kv.baddbmm_(phi_k[:, j:i].mT, v[:, j:i])
            ksum += phi_k[:, j:i].sum(1)[..., None]
    return out.view(shape)


def linear_chunkwise(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """SPEC 4 without maps, in chunks; T a multiple of ``chunk``."""
    B, H, T, _ = q.shape
    chunks = (B, H, T // chunk, chunk, -1)
    q, k, v = q.view(chunks), k.view(chunks), _with_ones(v).view(chunks)
    state = _previous((k.mT @ v).cumsum(2))
    out = (q @ k.mT).tril() @ v + q @ state
    return (out[..., :-1] / (out[..., -1:] + 1e-12)).reshape(B, H, T, -1)


def linear_chunk_by_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """The same, one chunk after another."""
    shape = v.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    kv, ksum = k.new_zeros(*k.shape[::2], v.shape[-1]), k.new_zeros(*k.shape[::2], 1)
    lower = torch.ones(chunk, chunk, device=q.device).tril()
    out = torch.empty_like(v)
    for i in range(0, q.shape[1], chunk):
        own = slice(i, i + chunk)
        weights = torch.bmm(q[:, own], k[:, own].mT).mul_(lower)
        num, den = torch.bmm(weights, v[:, own]), weights.sum(-1, keepdim=True)
        if i:
            num.baddbmm_(q[:, own], kv)
            den.baddbmm_(q[:, own], ksum)
        out[:, own] = num.div_(den.add_(1e-12))
        kv.baddbmm_(k[:, own].mT, v[:, own])
        ksum += k[:, own].sum(1)[..., None]
    return out.view(shape)


def transfer_loss(
    q: Tensor, k: Tensor, v: Tensor, weight_q: Tensor, weight_k: Tensor, gate: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """SPEC 7: the teacher by SDPA, the student in chunks, and their mean squared error."""
    teacher = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    student = chunkwise(q, k, v, weight_q, weight_k, gate, window)
    return teacher, (student - teacher).square().mean()


def _with_ones(v: Tensor) -> Tensor:
    """v and a column of ones, whose weighted sum is the denominator."""
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _previous(x: Tensor) -> Tensor:
    """Of every chunk, the one before it; of the first, zeros. [B, H, N, ...]"""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
