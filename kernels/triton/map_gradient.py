"""The gradients of a feature map's input and parameters, from that of a tile of features."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .features import activate_backward, product, project
from .problem import FAVOR


class MapTile(NamedTuple):
    """What the gradient of a tile's features needs."""

    x: Any  # [tokens, BLOCK_D]
    rows: Any
    valid: Any
    z: Any
    weight: Any


@triton.jit
def map_tile(p, x, rows, valid, weight, f, head):
    """A tile of x, projected."""
    return MapTile(x, rows, valid, project(x, rows, valid, weight, f, head, p.arithmetic), weight)


@triton.jit
def share_of(f, d_weight, program):
    """A program's share of the weight's gradient in memory; None without one."""
    if d_weight is None:
        return None
    else:
        return d_weight + program * (f.head_dim * f.width)


@triton.jit
def zero_weight(p, f, d_weight):
    """The gradient of a resident weight, to be added to; None for others, added up in memory."""
    if d_weight is None:
        return None
    elif f.resident:
        return tl.zeros((p.block_d, f.block), tl.float32)
    else:
        return None


@triton.jit
def zero_bias(f, d_bias):
    """The gradient of a bias, to be added to; None without one."""
    if d_bias is None:
        return None
    else:
        return tl.zeros((f.block,), tl.float32)


@triton.jit
def map_gradient(p, tile, phi, f, head, d_phi, dx, d_weight, slices):
    """(dx, d_weight, dz) with the gradient d_phi of a tile's features added; phi is not clamped.

    dx may be None. d_weight [BLOCK_D, f] is a tile for resident maps; others add it up in memory,
    at ``slices``.
    """
    dz = activate_backward(tile.z, phi, d_phi, f)
    dz = tl.where(tile.valid[:, None], dz, 0.0)
    if dx is not None:
        if f.weight is None or f.skip:
            dx += dz
        if f.activation == FAVOR:
            dx -= tile.x.to(tl.float32) * tl.sum(dz, 1)[:, None]
    if f.weight is not None:
        if f.resident:
            d_weight = product(tl.trans(tile.x), dz, d_weight, p.arithmetic)
            if dx is not None:
                dx = product(dz, tl.trans(tile.weight.high), dx, p.arithmetic)
        else:
            add_weight_slices(p, tile, dz, f, slices)
            if dx is not None:
                dx = add_input_slices(p, dz, f, head, dx)
    return dx, d_weight, dz


@triton.jit
def add_weight_slices(p, tile, dz, f, d_weight):
    """d_weight += x^T dz in memory, f.slice rows at a time."""
    tl.debug_barrier()  # what the tile before left may be another thread's
    column = tl.arange(0, f.block)
    for first in range(0, f.head_dim, f.slice):
        row = first + tl.arange(0, f.slice)
        mask = tile.valid[:, None] & (row < f.head_dim)[None, :]
        part = tl.load(tile.rows[:, None] + row[None, :], mask=mask, other=0.0)
        cells = d_weight + row[:, None] * f.width + column[None, :]
        inside = (row < f.head_dim)[:, None] & (column < f.width)[None, :]
        before = tl.load(cells, mask=inside, other=0.0)
        tl.store(cells, product(tl.trans(part), dz, before, p.arithmetic), mask=inside)


@triton.jit
def add_input_slices(p, dz, f, head, dx):
    """dx + dz W^T, f.slice columns of dz and W at a time; a product with ones picks those of dz."""
    row = tl.arange(0, p.block_d)
    weight = f.weight + (head // f.group).to(tl.int64) * (f.head_dim * f.width)
    for first in range(0, f.block, f.slice):
        column = first + tl.arange(0, f.slice)
        inside = (column < f.width)[:, None] & (row < f.head_dim)[None, :]
        part = tl.load(weight + row[None, :] * f.width + column[:, None], mask=inside, other=0.0)
        pick = tl.where(tl.arange(0, f.block)[:, None] == column[None, :], 1.0, 0.0)
        dx = product(product(dz, pick, None, p.arithmetic), part, dx, p.arithmetic)
    return dx


@triton.jit
def store_map_gradients(p, f, dw, db, d_weight, d_bias, program):
    """A program's shares of the gradients of a map's parameters."""
    column = tl.arange(0, f.block)
    if dw is not None:
        row = tl.arange(0, p.block_d)
        inside = (row < f.head_dim)[:, None] & (column < f.width)[None, :]
        tl.store(d_weight + row[:, None] * f.width + column[None, :], dw, mask=inside)
    if db is not None:
        tl.store(d_bias + program * f.width + column, db, mask=column < f.width)
