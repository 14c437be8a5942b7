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


def linear_chunkwise(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """SPEC 4 without maps, in chunks; T a multiple of ``chunk``."""
    B, H, T, _ = q.shape
    chunks = (B, H, T // chunk, chunk, -1)
    q, k, v = q.view(chunks), k.view(chunks), _with_ones(v).view(chunks)
    state = _previous((k.mT @ v).cumsum(2))
    out = (q @ k.mT).tril() @ v + q @ state
    return (out[..., :-1] / (out[..., -1:] + 1e-12)).reshape(B, H, T, -1)


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
