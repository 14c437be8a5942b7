"""SPEC in plain torch: what every kernel is tested against, and the backend "reference".

Computes in the wider of the input's dtype and fp32, so fp64 inputs give an fp64 result.
Differentiable by autograd, runs on any device, O(T^2) memory. Names and arguments are those of the
public functions, which document them; its step takes a key_padding_mask as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .features import Features
from .state import HybridState, is_readable, sequence_count, window_start

INF = float("inf")
# Gates count as this at least, and for lambda as its opposite at most, as in the kernels, where no
# denominator is zero then, nor does its inverse times a gradient overflow fp32.
LEAST_GATE = -60.0
P = ParamSpec("P")
R = TypeVar("R")


class Transfer(NamedTuple):
    """What attention_transfer returns: the teacher's output [B, H, T, V] and two losses, 0-dim."""

    teacher: Tensor
    mse: Tensor
    xent: Tensor


def _as_written(operator: Callable[P, R]) -> Callable[P, R]:
    """``operator`` outside of torch.autocast, which would round its products to 16 bits."""

    @wraps(operator)
    def call(*args: P.args, **options: P.kwargs) -> R:
        device = next(x for x in (*args, *options.values()) if isinstance(x, Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operator(*args, **options)
        with torch.autocast(device, enabled=False):
            return operator(*args, **options)

    return call


@_as_written
def feature_map(x: Tensor, features: Features) -> Tensor:
    """SPEC 1: phi(x), [B, H, T, D] -> [B, H, T, F]."""
    return _phi(_wide(x), features).to(x.dtype)


@_as_written
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_q: Features | None = None,
    feature_k: Features | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-12,
    state: HybridState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, HybridState]:
    """SPEC 4: y_i = num_i / den_i over all j <= i, by features alone."""
    tokens = _tokens(k, cu_seqlens, key_padding_mask)
    sequences = sequence_count(k, cu_seqlens)
    heads = q.shape[1]
    phi_q = _wide(q) if feature_q is None else _phi(_wide(q), feature_q)  # [B, H, T, F]
    phi_k = _wide(k) if feature_k is None else _phi(_wide(k), feature_k)  # [B, Hs, T, F]
    phi_k = phi_k * tokens.real[:, None, :, None]
    wide_v = _wide(v)  # [B, Hk, T, V]

    p = scale * phi_q @ _repeat(phi_k, heads).mT  # [B, H, T, T]
    p = p.masked_fill(~_causal(tokens, tokens), 0)
    num = p @ _repeat(wide_v, heads)  # [B, H, T, V]
    den = p.sum(-1, keepdim=True)  # [B, H, T, 1]

    if state is not None:
        phi_q_of = _by_sequence(scale * phi_q, tokens, sequences)  # [N, H, T, F]
        num = num + (phi_q_of @ _repeat(state.kv, heads)).sum_to_size(num.shape)
        den = den + (phi_q_of @ _repeat(state.ksum, heads).unsqueeze(-1)).sum_to_size(den.shape)
    real = tokens.real[:, None, :, None]
    den = torch.where(real, den + eps, 1.0)
    out = torch.where(real, num / den if normalize else num, 0.0).to(q.dtype)
    if not return_state:
        return out

    phi_k_of = _by_sequence(phi_k, tokens, sequences)  # [N, Hs, T, F]
    kv = phi_k_of.mT @ _repeat(wide_v, phi_k.shape[1])  # [N, Hs, F, V]
    ksum = phi_k_of.sum(2)  # [N, Hs, F]
    length = _by_sequence(tokens.real[:, None, :, None], tokens, sequences).sum((1, 2, 3))  # [N]
    if state is not None:
        kv, ksum, length = kv + state.kv, ksum + state.ksum, length + state.length
    return out, HybridState.of_sums(
        kv, ksum, length, head_dim=k.shape[3], kv_heads=k.shape[1], dtype=k.dtype
    )


@_as_written
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    sink: int = 0,
    scale: float | None = None,
    affine: bool = False,
    state: HybridState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, HybridState]:
    """SPEC 3: softmax over the window and features beyond it, under one denominator."""
    if state is None and not return_state:
        tokens = _tokens(k, cu_seqlens, key_padding_mask)
        inside, outside = _sets(tokens, tokens, window, window_kind, sink)
        weigh = affine and window + sink > 0
        student = _attend(q, k, v, feature_q, feature_k, gate, inside, outside, scale, weigh)
        return student.out.masked_fill(~tokens.real[:, None, :, None], 0).to(q.dtype)
    if state is None:
        sequences = sequence_count(k, cu_seqlens)
        settings: dict[str, Any] = {"window": window, "window_kind": window_kind, "sink": sink}
        state = HybridState.empty_for(k, v, feature_k, batch=sequences, **settings)
    else:
        state = state.clone()
    step: dict[str, Any] = {"scale": scale, "affine": affine, "key_padding_mask": key_padding_mask}
    if cu_seqlens is None:
        out = hybrid_attention_step_(q, k, v, feature_q, feature_k, gate, state, **step)
        return (out, state) if return_state else out
    bounds = cu_seqlens.tolist()
    out = q.new_zeros(*q.shape[:3], v.shape[3])  # also of tokens past the last sequence
    if state.batch:
        q, k, v = (_unpack(x, bounds) for x in (q, k, v))  # [N, H, max T, D]
        token = torch.arange(q.shape[2], device=q.device)
        step["key_padding_mask"] = token < cu_seqlens.diff()[:, None]
        rows = hybrid_attention_step_(q, k, v, feature_q, feature_k, gate, state, **step)
        for row, (begin, end) in zip(rows, pairwise(bounds), strict=True):
            out[0, :, begin:end] = row[:, : end - begin]
    return (out, state) if return_state else out


@torch.no_grad()
@_as_written
def hybrid_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    state: HybridState,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    affine: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """SPEC 5: appends T tokens to the state, in place, and returns their outputs."""
    if state_indices is not None:
        if is_readable(state_indices):
            wanted = state_indices.tolist()
            if len({*wanted}) < len(wanted) or not {*wanted} <= {*range(state.batch)}:
                raise ValueError(
                    f"hybrid_attention_step_: state_indices is {wanted}, needs distinct slots "
                    f"below {state.batch}"
                )
        slots = state.select(state_indices)
        step: dict[str, Any] = {
            "scale": scale,
            "affine": affine,
            "key_padding_mask": key_padding_mask,
        }
        out = hybrid_attention_step_(q, k, v, feature_q, feature_k, gate, slots, **step)
        for pool, slot in zip(state.tensors.values(), slots.tensors.values(), strict=True):
            pool[state_indices] = slot
        return out

    window, kind, sink = state.window, state.window_kind, state.sink
    new = _tokens(k, None, key_padding_mask)
    new = new._replace(position=new.position + state.length[:, None])
    old = _remembered(state)
    keys = _Tokens(*(torch.cat(pair, 1) for pair in zip(old, new, strict=True)))  # [P, s + R + T]
    k_all = torch.cat([state.k_sink, state.k_ring, k], 2)  # [P, Hk, s + R + T, D]
    v_all = torch.cat([state.v_sink, state.v_ring, v], 2)
    # A stale slot may hold anything, and 0 * nan is nan.
    k_all = k_all.masked_fill(~keys.real[:, None, :, None], 0)
    v_all = v_all.masked_fill(~keys.real[:, None, :, None], 0)

    inside, outside = _sets(new, keys, window, kind, sink)
    weigh = affine and window + sink > 0
    student = _attend(
        q, k_all, v_all, feature_q, feature_k, gate, inside, outside, scale, weigh, state
    )
    out = student.out.masked_fill(~new.real[:, None, :, None], 0).to(q.dtype)

    length = state.length + new.real.sum(1)
    folded = window_start(length - 1 - state.slack, window, kind).maximum(state.folded)
    fold = keys.real & (keys.position >= sink) & (keys.position < folded[:, None])  # [P, s + R + T]
    phi_k = _phi(_wide(k_all), feature_k) * fold[:, None, :, None]  # [P, Hs, s + R + T, F]
    state.kv.add_(phi_k.mT @ _repeat(_wide(v_all), phi_k.shape[1]))
    state.ksum.add_(phi_k.sum(2))

    p, t = (new.real & (new.position < sink)).nonzero(as_tuple=True)
    state.k_sink[p, :, new.position[p, t]] = k[p, :, t]
    state.v_sink[p, :, new.position[p, t]] = v[p, :, t]
    if state.ring:
        p, t = (new.real & (new.position >= length[:, None] - state.ring)).nonzero(as_tuple=True)
        state.k_ring[p, :, new.position[p, t] % state.ring] = k[p, :, t]
        state.v_ring[p, :, new.position[p, t] % state.ring] = v[p, :, t]
    state.length.copy_(length)
    state.folded.copy_(folded)
    return out


@_as_written
def attention_transfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,
    *,
    window: int = 64,
    window_kind: str = "sliding",
    sink: int = 0,
    scale: float | None = None,
    affine: bool = False,
    xent: bool = False,
    cu_seqlens: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Transfer:
    """SPEC 7: causal softmax attention (the teacher) and how far hybrid attention is from it."""
    q, k, v = q.detach(), k.detach(), v.detach()
    tokens = _tokens(k, cu_seqlens, key_padding_mask)
    inside, outside = _sets(tokens, tokens, window, window_kind, sink)
    weigh = affine and window + sink > 0
    student = _attend(q, k, v, feature_q, feature_k, gate, inside, outside, scale, weigh)

    real = tokens.real[:, None, :, None]
    scores = student.scores.masked_fill(~_causal(tokens, tokens), -INF)  # [B, H, T, T]
    target = scores.softmax(-1).masked_fill(~real, 0)
    teacher = target @ _repeat(_wide(v), q.shape[1])  # [B, H, T, V]

    rows = (tokens.real.sum() * q.shape[1]).clamp(min=1)
    residual = (student.out - teacher).masked_fill(~real, 0)
    mse = residual.square().sum() / (rows * v.shape[-1])
    cross = -(target * student.weights.clamp(min=1e-12).log()).sum() / rows
    return Transfer(teacher.to(q.dtype), mse, cross if xent else torch.zeros_like(mse))


class _Tokens(NamedTuple):
    """Of each token [B, T]: whether it is real, its sequence in the row, its position there."""

    real: Tensor
    sequence: Tensor
    position: Tensor


class _Student(NamedTuple):
    out: Tensor  # [B, H, T, V]; of padded queries undefined but finite
    weights: Tensor  # [B, H, T, S] normalised
    scores: Tensor  # [B, H, T, S] scale * q . k
    m: Tensor  # [B, H, T] largest score of the window
    den: Tensor  # [B, H, T]


def _attend(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hk, S, D]
    v: Tensor,  # [B, Hk, S, V]
    feature_q: Features,
    feature_k: Features,
    gate: Tensor,  # [H]
    inside: Tensor,  # [B, 1, T, S] the pairs in W
    outside: Tensor,  # [B, 1, T, S] the pairs in N, without those in `state`
    scale: float | None,
    affine: bool,  # False where all keys are linear, since their factor cancels
    state: HybridState | None = None,
) -> _Student:
    """SPEC 3, the one formula of hybrid_attention, its step and attention_transfer."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = gate.to(q.dtype).clamp(min=LEAST_GATE).sigmoid()[:, None, None]  # [H, 1, 1]
    # sigmoid(-x), since 1 - sigmoid(x) loses its last digits, and all of them from 40 on.
    lam = gate.to(q.dtype).neg().clamp(min=LEAST_GATE).sigmoid()[:, None, None]
    if not affine:
        lam = torch.ones_like(g)
    phi_q, phi_k = _phi(q, feature_q), _phi(k, feature_k)  # [B, H, T, F], [B, Hs, S, F]

    scores = scale * q @ _repeat(k, heads).mT  # [B, H, T, S]
    m = F.pad(scores.masked_fill(~inside, -INF), (0, 1), value=-INF).amax(-1, keepdim=True)
    m = m.masked_fill(~inside.any(-1, keepdim=True), 0)  # [B, H, T, 1]; an empty window has m = 0
    p = g * (scores - m).masked_fill(~inside, -INF).exp()  # [B, H, T, S]
    p = p + lam * (phi_q @ _repeat(phi_k, heads).mT).masked_fill(~outside, 0)
    num = p @ _repeat(v, heads)  # [B, H, T, V]
    den = p.sum(-1, keepdim=True)  # [B, H, T, 1]
    if state is not None:
        num = num + lam * (phi_q @ _repeat(state.kv, heads))
        den = den + lam * (phi_q @ _repeat(state.ksum, heads).unsqueeze(-1))
    seen = (inside | outside).any(
        -1, keepdim=True
    )  # padded queries see nothing, not even themselves
    den = den.masked_fill(~seen, 1)
    return _Student(num / den, p / den, scores, m.squeeze(-1), den.squeeze(-1))


def _phi(x: Tensor, features: Features) -> Tensor:
    """phi of x [B, Hx, T, D], [B, max(Hx, Hf), T, F]: the fewer heads serve groups."""
    heads = max(x.shape[1], features.heads)
    x = _repeat(x, heads)
    z = x @ _repeat(features.weight.to(x.dtype)[None], heads)  # [B, heads, T, f]
    if features.bias is not None:
        z = z + _repeat(features.bias.to(x.dtype)[None, :, None], heads)
    if features.skip:
        z = z + x
    if features.activation == "identity":
        return z
    if features.activation == "softmax":
        sides = [z.softmax(-1), (-z).softmax(-1)]
    elif features.activation == "exp":
        sides = [(z - z.amax(-1, True)).exp(), (z.amin(-1, True) - z).exp()]
    elif features.activation == "elu1":
        sides = [1 + F.elu(z)]
    elif features.activation == "relu":
        sides = [z.relu()]
    else:  # favor
        sides = [(z - x.square().sum(-1, True) / 2).exp() / features.width**0.5]
    return torch.cat(sides[: 1 + features.two_sided], -1).clamp(min=features.eps)


def _tokens(x: Tensor, cu_seqlens: Tensor | None, key_padding_mask: Tensor | None) -> _Tokens:
    """The tokens of x [B, H, T, D]; positions count the real tokens of a sequence (SPEC 6)."""
    batch, _, length, _ = x.shape
    token = torch.arange(length, device=x.device).expand(batch, length)
    if cu_seqlens is not None:
        if is_readable(cu_seqlens):
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > length:
                raise ValueError(
                    f"reference: cu_seqlens is {bounds}, needs to go from 0 to at most T = {length}"
                    " without decreasing"
                )
        sequence = torch.searchsorted(cu_seqlens[1:].long(), token.contiguous(), right=True)
        return _Tokens(token < cu_seqlens[-1], sequence, token - cu_seqlens.long()[sequence])
    if key_padding_mask is not None:
        return _Tokens(key_padding_mask, torch.zeros_like(token), key_padding_mask.cumsum(1) - 1)
    return _Tokens(torch.ones_like(token, dtype=torch.bool), torch.zeros_like(token), token)


def _remembered(state: HybridState) -> _Tokens:
    """The tokens that the sinks and the ring hold, in that order: [P, s + R]."""
    length = state.length[:, None]
    sink = torch.arange(state.sink, device=length.device).expand(state.batch, -1)
    slot = torch.arange(state.ring, device=length.device)
    ring = length - 1 - (length - 1 - slot) % max(state.ring, 1)  # the last position == slot mod R
    in_ring = (ring >= state.folded[:, None]) & (ring >= state.sink)  # sinks are counted there
    position = torch.cat([sink, ring], 1)
    return _Tokens(torch.cat([sink < length, in_ring], 1), torch.zeros_like(position), position)


def _causal(queries: _Tokens, keys: _Tokens) -> Tensor:
    """The pairs [B, 1, T, S] with real query and key of one sequence, j <= i."""
    real = queries.real[:, :, None] & keys.real[:, None, :]
    same = queries.sequence[:, :, None] == keys.sequence[:, None, :]
    return (real & same & (keys.position[:, None, :] <= queries.position[:, :, None]))[:, None]


def _sets(
    queries: _Tokens, keys: _Tokens, window: int, window_kind: str, sink: int
) -> tuple[Tensor, Tensor]:
    """SPEC 2: the pairs attended by softmax (W) and by features (N), [B, 1, T, S] each."""
    causal = _causal(queries, keys)
    start = window_start(queries.position, window, window_kind)[:, None, :, None]
    position = keys.position[:, None, None, :]
    near = (position >= start) | (position < sink)
    return causal & near, causal & ~near


def _by_sequence(x: Tensor, tokens: _Tokens, sequences: int) -> Tensor:
    """x [B, H, T, X] as [N, H, T, X], zero outside each row's own sequence; unpacked x as it is."""
    if x.shape[0] == sequences and x.shape[0] != 1:
        return x
    own = tokens.sequence == torch.arange(sequences, device=x.device)[:, None]  # [N, T]
    return x * own[:, None, :, None]


def _unpack(x: Tensor, bounds: list[int]) -> Tensor:
    """Packed [1, H, T, X] as [N, H, longest, X], zero-padded on the right."""
    rows = [x[0, :, a:b].transpose(0, 1) for a, b in pairwise(bounds)]
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """x [B, Hx, ...] with each head repeated for its group, to [B, heads, ...]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
