"""feature_map and its gradient, with the schemas of torch.ops.lolcats_ops (SPEC 1).

A program takes a tile of the tokens of a head. Backward, it takes several tiles in turn, since each
program leaves a share of the weight's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    arithmetic_of,
    constant,
    empty_like_rows,
    feature_map_of,
    rows,
)
from .features import activate, clamp, load_weight
from .launch import launch, next_power_of_2, tiles_for
from .map_gradient import (
    map_gradient,
    map_tile,
    share_of,
    store_map_gradients,
    zero_bias,
    zero_weight,
)
from .problem import Map, Rows, Sides
from .tokens import Tokens, load_tile, rows_of, store_tile


class Maps(NamedTuple):
    """A feature map of all tokens of x."""

    x: Rows
    map: Map
    arithmetic: Any
    tokens: Any  # T
    heads: Any  # constants from here on
    chunk: Any  # tokens of a tile
    block_d: Any
    steps: Any  # tiles of a program
    programs: Any  # of a head; no constant


@triton.jit
def program_rows(p):
    """(head, row of the batch, first token) of a program."""
    row, part = tl.program_id(0) // p.programs, tl.program_id(0) % p.programs
    return row % p.heads, row // p.heads, part * (p.steps * p.chunk)


@triton.jit
def tokens_of(p, start, step):
    """A tile of tokens."""
    token = start + step * p.chunk + tl.arange(0, p.chunk)
    return Tokens(tl.full((), 0, tl.int64), token.to(tl.int64), token, token < p.tokens)


@triton.jit
def projected(p, batch, head, tokens, weight):
    """The MapTile of a tile of tokens."""
    rows = rows_of(p.x, batch, head, tokens)
    x = load_tile(rows, tokens.valid, 0, p.x.width, p.block_d)
    return map_tile(p, x, rows, tokens.valid, weight, p.map, head)


@triton.jit
def feature_map_forward(p, y):
    """y = phi(x)."""
    head, batch, start = program_rows(p)
    weight = load_weight(p.map, head, p.arithmetic, p.block_d)
    for step in range(p.steps):
        tokens = tokens_of(p, start, step)
        valid = tokens.valid
        tile = projected(p, batch, head, tokens, weight)
        phi = clamp(activate(tile.z, p.map), p.map)
        y_rows = rows_of(y, batch, head, tokens)
        store_tile(y_rows, phi.plus, valid, 0, p.map.width, p.map.block)
        if p.map.two_sided:
            store_tile(y_rows + p.map.width, phi.minus, valid, 0, p.map.width, p.map.block)


@triton.jit
def feature_map_gradients(p, dy, dx, d_weight, d_bias):
    """dx, and every program's share of the parameters' gradients."""
    head, batch, start = program_rows(p)
    program = tl.program_id(0).to(tl.int64)
    weight = load_weight(p.map, head, p.arithmetic, p.block_d)
    own = share_of(p.map, d_weight, program)
    dw, db = zero_weight(p, p.map, d_weight), zero_bias(p.map, d_bias)
    for step in range(p.steps):
        tokens = tokens_of(p, start, step)
        valid = tokens.valid
        tile = projected(p, batch, head, tokens, weight)
        dy_rows = rows_of(dy, batch, head, tokens)
        plus = load_tile(dy_rows, valid, 0, p.map.width, p.map.block).to(tl.float32)
        if p.map.two_sided:
            minus = load_tile(dy_rows + p.map.width, valid, 0, p.map.width, p.map.block)
            d_phi = Sides(plus, minus.to(tl.float32))
        else:
            d_phi = Sides(plus, None)
        grad = tl.zeros((p.chunk, p.block_d), tl.float32)
        phi = activate(tile.z, p.map)
        grad, dw, dz = map_gradient(p, tile, phi, p.map, head, d_phi, grad, dw, own)
        if d_bias is not None:
            db += tl.sum(dz, 0)
        store_tile(rows_of(dx, batch, head, tokens), grad, valid, 0, p.x.width, p.block_d)
    store_map_gradients(p, p.map, dw, db, own, d_bias, program)


BACKWARD_STEPS = 16  # a share of the weight's gradient for every 16 tiles


def maps_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, codes: tuple, kernel: str, steps: int
) -> tuple[Maps, tuple[int], dict[str, int]]:
    """(the arguments of a kernel, its grid, its options)."""
    batch, heads, length, head_dim = x.shape
    tiles = tiles_for(kernel, x, weight, x)
    programs = -(-length // (tiles.chunk * steps))
    problem = Maps(
        rows(x),
        feature_map_of(weight, bias, heads, head_dim, codes, tiles),
        arithmetic_of(x.dtype),
        length,
        *map(constant, (heads, tiles.chunk, next_power_of_2(head_dim), steps)),
        programs,
    )
    return (
        problem,
        (programs * batch * heads,),
        {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages},
    )


def feature_map(x: Tensor, weight: Tensor, bias: Tensor | None, *codes: float) -> Tensor:
    """phi(x)."""
    problem, grid, options = maps_of(x, weight, bias, codes, "feature_map", 1)
    sides = 2 if problem.map.two_sided.value else 1
    y = empty_like_rows(x, sides * problem.map.width.value)
    launch(feature_map_forward, grid, problem, rows(y), **options)
    return y


def feature_map_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *codes: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); the last is empty without a bias."""
    problem, grid, options = maps_of(x, weight, bias, codes, "feature_map", BACKWARD_STEPS)
    dx = empty_like_rows(x, x.shape[3])
    shares = weight.new_zeros(*x.shape[:2], problem.programs, *weight.shape[1:])
    bias_shares = None if bias is None else weight.new_empty(*shares.shape[:3], weight.shape[2])
    launch(feature_map_gradients, grid, problem, rows(dy), rows(dx), shares, bias_shares, **options)

    def of_heads(x: Tensor) -> Tensor:
        return x.sum((0, 2)).unflatten(0, (weight.shape[0], -1)).sum(1)

    d_bias = weight.new_empty(0) if bias_shares is None else of_heads(bias_shares)
    return dx, of_heads(shares), d_bias
