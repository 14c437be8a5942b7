"""Which program works on what, and tiles of the rows of q, k, v and their gradients (SPEC 6)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .problem import Place


class Tokens(NamedTuple):
    """BLOCK successive positions of a sequence: token = start + offset."""

    start: Any
    offset: Any  # [BLOCK]
    position: Any  # [BLOCK]
    valid: Any  # [BLOCK], whether the position exists


@triton.jit
def place_of(p):
    """The program's work. Neighbours share queries, keys and values, and so the L2 cache."""
    pid = tl.program_id(0)
    part, segment = pid % p.slices, pid // p.slices % p.segments
    index = pid // p.slices
    head, n = index // p.segments % p.heads, index // (p.segments * p.heads)
    first, batch = tl.full((), 0, tl.int64), n
    if p.sequences.bounds is not None:
        first = tl.load(p.sequences.bounds + n).to(tl.int64)
        length = (tl.load(p.sequences.bounds + n + 1).to(tl.int64) - first).to(tl.int32)
        batch = n * 0
    elif p.sequences.index is not None:
        length = tl.load(p.sequences.lengths + n)
    else:
        length = p.sequences.tokens + n * 0
    return Place(n, batch, first, length, head, part, part * p.block_v, segment, index)


@triton.jit
def chunk_range(p, at):
    """[begin, end): the chunks of the program's segment, of which a short sequence has fewer."""
    chunks = tl.cdiv(at.length, p.chunk)
    begin = tl.minimum(at.segment * p.segment_chunks, chunks)
    return begin, tl.minimum(begin + p.segment_chunks, chunks)


@triton.jit
def chunk_of(at, turn):
    """turn, in a way that hides from the compiler how it grows.

    Else the compiler would carry a pointer into every tensor from chunk to chunk, in registers that
    the tiles need.
    """
    return tl.minimum(turn, at.length)  # a sequence has no more chunks than tokens


@triton.jit
def tokens_at(p, at, position, BLOCK: tl.constexpr):
    """The tokens at positions [position, position + BLOCK)."""
    r = tl.arange(0, BLOCK)
    positions = position + r
    valid = (positions >= 0) & (positions < at.length)
    if p.sequences.index is not None:
        row = p.sequences.index + at.n.to(tl.int64) * p.sequences.tokens
        token = tl.load(row + positions, mask=valid, other=0)
        return Tokens(tl.full((), 0, tl.int64), token.to(tl.int64), positions, valid)
    else:
        return Tokens(at.first + position, r, positions, valid)


@triton.jit
def rows_of(x, batch, head, tokens):
    """Pointers to the rows of x at ``tokens``, [BLOCK]."""
    base = x.pointer + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head
    return base + tokens.start * x.token + tokens.offset * x.token


@triton.jit
def load_tile(rows, valid, column, width: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [column, column + BLOCK) of rows, zero where there are none."""
    columns = column + tl.arange(0, BLOCK)
    if width % BLOCK == 0:
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (columns < width)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_wide(rows, valid, column, width: tl.constexpr, BLOCK: tl.constexpr):
    """load_tile of numbers of 32 bits among tiles of 16. All tiles of a shape are loaded as many
    numbers at a time: of these, 32 bytes by two requests, with gaps between the threads. Four at a
    time are of another shape."""
    four = column + 4 * tl.arange(0, BLOCK // 4)[:, None] + tl.arange(0, 4)[None, :]
    mask = valid[:, None, None]
    if width % BLOCK != 0:
        mask = mask & (four < width)[None, :, :]
    x = tl.load(rows[:, None, None] + four[None, :, :], mask=mask, other=0.0)
    return x.reshape(x.shape[0], BLOCK)


@triton.jit
def store_tile(rows, x, valid, column, width: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of load_tile."""
    columns = column + tl.arange(0, BLOCK)
    if width % BLOCK == 0:
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (columns < width)[None, :]
    tl.store(rows[:, None] + columns[None, :], x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def load_q(p, at, tokens):
    return load_tile(rows_of(p.q, at.batch, at.head, tokens), tokens.valid, 0, p.q.width, p.block_d)


@triton.jit
def load_k(p, at, tokens):
    rows = rows_of(p.k, at.batch, at.head // p.group, tokens)
    return load_tile(rows, tokens.valid, 0, p.k.width, p.block_d)


@triton.jit
def load_v(p, at, tokens):
    rows = rows_of(p.v, at.batch, at.head // p.group, tokens)
    return load_tile(rows, tokens.valid, at.column, p.v.width, p.block_v)


@triton.jit
def statistic(p, at, tokens):
    """Offsets of ``tokens`` in a contiguous [B, H, T]."""
    row = (at.batch.to(tl.int64) * p.heads + at.head) * p.sequences.tokens
    return row + tokens.start + tokens.offset
