"""The cross-entropy of attention_transfer, and its gradient (SPEC 7).

With c = d_xent / (H * real tokens) the gradient of an unnormalised weight w_ij = a_ij den_i is

    dw_ij = -c a*_ij / w_ij + c above_i / den_i,  above_i = sum_j a*_ij,  where a_ij >= 1e-12.

The second term is the same for all keys, so it joins what comes in for mse (Incoming.constant) and
costs nothing; the first is summed over pairs in N for the maps. Over pairs in W it matters for the
gate alone, whose gradient follows from that of N: sum_j w_ij dw_ij = 0.

Chunks of queries (or keys) are independent of each other here. The programs of a sequence take
them in turn, every segments-th, beginning with those that see most.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import attention
from .arguments import Plan
from .backward_pass import add_product
from .features import activate, keep_rows, load_weight, times
from .forward import feature_products, linear_factor, log2_gate, scores
from .map_gradient import map_gradient, map_tile, share_of, store_map_gradients
from .problem import INF, LOG2E, Sides
from .state import key_features, query_features
from .tokens import load_k, load_q, place_of, rows_of, statistic, tokens_at
from .window import first_linear_query, folds, linear_mask, window_start

LEAST = tl.constexpr(1e-12)  # the floor of the student's weights in the cross-entropy
LOG2_LEAST = tl.constexpr(-39.863137138648355)


class Student(NamedTuple):
    """What the normalised weights a of queries follow from."""

    phi: Sides  # lambda phi_q as an operand, [queries, f]: a = inverse * phi . phi_k in N
    inverse: Any  # 1 / den, [queries]
    start: Any  # e(i), [queries]
    offset: Any  # log2 a = s - offset in W, [queries]


class KeyTiles(NamedTuple):
    """Tiles of keys of a chunk of queries, in two loops: those without a mask first."""

    lead: Any  # tiles [0, lead) hold sinks: they need masks
    far: Any  # tiles [lead, far) do not
    count: Any  # how many do: lead and [far, end)


@triton.jit
def load_student(p, at, tokens, q, weight_q, m_ptr, den_ptr):
    own = statistic(p, at, tokens)
    m = tl.load(m_ptr + own, mask=tokens.valid, other=0.0) * LOG2E
    den = tl.load(den_ptr + own, mask=tokens.valid, other=1.0)
    phi = query_features(p, at, tokens, q, weight_q, linear_factor(p, at))
    offset = tl.where(den > 0, m - log2_gate(p, at) + tl.log2(den), INF)
    return Student(phi, 1.0 / den, window_start(p.window, tokens.position), offset)


@triton.jit
def tiles_of_keys(p, at, c, WINDOWS: tl.constexpr, TILE: tl.constexpr):
    """The tiles of a chunk: masked where some query is before some key or, with WINDOWS, where not
    all pairs are in N."""
    end = tl.cdiv(tl.minimum((c + 1) * p.chunk, at.length), TILE)
    lead = end * 0
    far = c * p.chunk // TILE
    if WINDOWS:
        far = window_start(p.window, c * p.chunk) // TILE
        lead = tl.minimum((p.window.sink + TILE - 1) // TILE, end)
        far = tl.maximum(far, lead)
    return KeyTiles(lead, far, lead + end - far)


@triton.jit
def masked_tile(tiles, n):
    """The n-th of the tiles that need masks."""
    return tl.where(n < tiles.lead, n, tiles.far + n - tiles.lead)


@triton.jit
def quotients(target, w, alive):
    """a* / w where it counts: -1/c of the gradient of w."""
    return tl.where(alive, target / w, 0.0)


class QueryPass(NamedTuple):
    """Sums of entropy_queries, to be multiplied by -c."""

    d_phi: Sides  # [C, f]
    linear: Any  # [C], a* of the pairs in N that count
    near: Any  # [C], of those in W


@triton.jit
def add_keys(
    p, at, i, q, student, lse, weight_k, sums, t, MASKED: tl.constexpr, TILE: tl.constexpr
):
    keys = tokens_at(p, at, t * TILE, TILE)
    k = load_k(p, at, keys)
    s = scores(p, q, k)
    target = tl.exp2(s - lse[:, None])
    phi_k = key_features(p, at, keys, k, weight_k)
    w = feature_products(student.phi, phi_k, p.arithmetic)
    alive = w * student.inverse[:, None] >= LEAST
    near = sums.near
    if MASKED:
        linear = linear_mask(p, student.start, keys.position)
        seen = i[:, None] >= keys.position[None, :]
        counts = seen & (linear == 0) & (s - student.offset[:, None] >= LOG2_LEAST)
        near += tl.sum(tl.where(counts, target, 0.0), 1)
        alive = alive & linear
    linear_sum = sums.linear + tl.sum(tl.where(alive, target, 0.0), 1)
    d_phi = add_product(quotients(target, w, alive), phi_k, sums.d_phi, p.arithmetic)
    return QueryPass(d_phi, linear_sum, near)


@triton.jit
def no_features(p, f):
    """Zero gradients of a chunk's features."""
    zero = tl.zeros((p.chunk, f.block), tl.float32)
    if f.two_sided:
        return Sides(zero, zero)
    else:
        return Sides(zero, None)


@triton.jit
def add_map_gradients(p, x, rows, valid, weight, f, head, d_phi, d_weight, d_bias, program):
    """Adds a chunk's share to the program's in memory: in registers it would crowd the loops over
    pairs."""
    tile = map_tile(p, x, rows, valid, weight, f, head)
    phi = activate(tile.z, f)
    own_weight = share_of(f, d_weight, program)
    column = tl.arange(0, f.block)
    dw = None
    tl.debug_barrier()  # other threads may have written what is read here
    if f.resident:
        row = tl.arange(0, p.block_d)
        inside = (row < f.head_dim)[:, None] & (column < f.width)[None, :]
        dw = tl.load(own_weight + row[:, None] * f.width + column[None, :], mask=inside, other=0.0)
    unused, dw, dz = map_gradient(p, tile, phi, f, head, d_phi, None, dw, own_weight)
    db = None
    if d_bias is not None:
        before = d_bias + program * f.width + column
        db = tl.load(before, mask=column < f.width, other=0.0) + tl.sum(dz, 0)
    store_map_gradients(p, f, dw, db, own_weight, d_bias, program)


@triton.jit
def entropy_queries(
    p, coefficient, m_ptr, den_ptr, lse_ptr, constants, d_weight, d_bias, d_gate,
    TILE: tl.constexpr,
):  # fmt: skip
    """-c above_i of every query; and of every program the first terms' share in the gradients of
    map_q and in the sum of dm.

    coefficient: pointer to c. d_weight and d_bias must be zero.
    """
    at = place_of(p)
    program = tl.program_id(0).to(tl.int64)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    c_entropy = -tl.load(coefficient)
    total_dm = tl.zeros((p.chunk,), tl.float32)
    chunks = tl.cdiv(at.length, p.chunk)
    for turn in range(at.segment, chunks, p.segments):
        c = chunks - 1 - turn
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        i, q = tokens.position, load_q(p, at, tokens)
        student = load_student(p, at, tokens, q, weight_q, m_ptr, den_ptr)
        own = statistic(p, at, tokens)
        lse = tl.load(lse_ptr + own, mask=tokens.valid, other=INF) * LOG2E
        zero = tl.zeros((p.chunk,), tl.float32)
        sums = QueryPass(no_features(p, p.map_q), zero, zero)
        tiles = tiles_of_keys(p, at, c, True, TILE)
        for t in range(tiles.lead, tiles.far):
            sums = add_keys(p, at, i, q, student, lse, weight_k, sums, t, False, TILE)
        for n in range(tiles.count):
            t = masked_tile(tiles, n)
            sums = add_keys(p, at, i, q, student, lse, weight_k, sums, t, True, TILE)

        tl.store(constants + own, (sums.linear + sums.near) * c_entropy, mask=tokens.valid)
        total_dm += sums.linear * c_entropy
        factor = c_entropy
        if linear_factor(p, at) is not None:
            factor *= linear_factor(p, at)
        q_rows = rows_of(p.q, at.batch, at.head, tokens)
        add_map_gradients(
            p, q, q_rows, tokens.valid, weight_q, p.map_q, at.head, times(sums.d_phi, factor),
            d_weight, d_bias, program,
        )  # fmt: skip
    tl.store(d_gate + program, tl.sum(total_dm, 0))


@triton.jit
def add_queries(
    p, at, j, k, phi_k, den_ptr, lse_ptr, weight_q, d_phi, u, MASKED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """d_phi [C, f] with a tile of queries; pairs are [keys, queries]."""
    tokens = tokens_at(p, at, u * TILE, TILE)
    q = load_q(p, at, tokens)
    own = statistic(p, at, tokens)
    lse = tl.load(lse_ptr + own, mask=tokens.valid, other=INF) * LOG2E
    den = tl.load(den_ptr + own, mask=tokens.valid, other=1.0)
    phi_q = query_features(p, at, tokens, q, weight_q, linear_factor(p, at))
    target = tl.exp2(scores(p, k, q) - lse[None, :])
    w = feature_products(phi_k, phi_q, p.arithmetic)
    alive = w * (1.0 / den)[None, :] >= LEAST
    if MASKED:
        alive = alive & (j[:, None] < window_start(p.window, tokens.position)[None, :])
    return add_product(quotients(target, w, alive), phi_q, d_phi, p.arithmetic)


@triton.jit
def entropy_keys(p, coefficient, den_ptr, lse_ptr, d_weight, d_bias, TILE: tl.constexpr):
    """The first terms' share in the gradients of map_k, of every program; as entropy_queries."""
    at = place_of(p)
    program = tl.program_id(0).to(tl.int64)
    weight_q = load_weight(p.map_q, at.head, p.arithmetic, p.block_d)
    weight_k = load_weight(p.map_k, at.head, p.arithmetic, p.block_d)
    c_entropy = -tl.load(coefficient)
    chunks = tl.cdiv(at.length, p.chunk)
    end = tl.cdiv(at.length, TILE)
    for c in range(at.segment, chunks, p.segments):
        tokens = tokens_at(p, at, c * p.chunk, p.chunk)
        j, k = tokens.position, load_k(p, at, tokens)
        phi_k = key_features(p, at, tokens, k, weight_k)
        # The first tile with a query that has the first key in N, and the first where all have all.
        first = tl.minimum(first_linear_query(p.window, c * p.chunk) // TILE, end)
        full = tl.cdiv(first_linear_query(p.window, (c + 1) * p.chunk - 1), TILE)
        full = tl.minimum(full, end)
        d_phi = no_features(p, p.map_k)
        for u in range(first, full):
            d_phi = add_queries(
                p, at, j, k, phi_k, den_ptr, lse_ptr, weight_q, d_phi, u, True, TILE
            )
        for u in range(full, end):
            d_phi = add_queries(
                p, at, j, k, phi_k, den_ptr, lse_ptr, weight_q, d_phi, u, False, TILE
            )
        d_phi = keep_rows(times(d_phi, c_entropy), folds(p, tokens))
        k_rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
        add_map_gradients(
            p, k, k_rows, tokens.valid, weight_k, p.map_k, at.head, d_phi, d_weight, d_bias, program
        )


def entropy_gradients(
    pairs: Plan,
    weight_q: Tensor,
    bias_q: Tensor | None,
    weight_k: Tensor,
    bias_k: Tensor | None,
    coefficient: Tensor,
    m: Tensor,
    den: Tensor,
    lse: Tensor,
    constants: Tensor,
) -> dict[str, Tensor | None]:
    """The first terms' shares in the gradients of the maps and dm, by their names in Gradients, and
    the second terms in ``constants`` [B, H, T]."""
    d_weight_q = attention.shares(pairs, weight_q, False)
    d_weight_k = attention.shares(pairs, weight_k, False)
    d_bias_q = attention.shares(pairs, bias_q, False)
    d_bias_k = attention.shares(pairs, bias_k, False)
    dm = attention.fp32(lse, pairs.programs)
    other = pairs.tiles.other
    pairs.run(entropy_queries, coefficient, m, den, lse, constants, d_weight_q, d_bias_q, dm, other)
    pairs.run(entropy_keys, coefficient, den, lse, d_weight_k, d_bias_k, other)
    return {
        "weight_q": attention.of_maps(pairs, d_weight_q, weight_q),
        "bias_q": attention.of_maps(pairs, d_bias_q, bias_q),
        "weight_k": attention.of_maps(pairs, d_weight_k, weight_k),
        "bias_k": attention.of_maps(pairs, d_bias_k, bias_k),
        "dm": attention.of_programs(pairs, dm),
    }
