"""phi(x) and its gradient on tiles of tokens (SPEC 1), for all kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .problem import ELU1, EXP, FAVOR, IDENTITY, INF, LOG2E, RELU, SOFTMAX, Sides, Split


@triton.jit
def product(a, b, acc, arithmetic):
    """acc + a @ b, summed in fp32; acc may be None.

    On one row, tensor cores would idle: it is summed as it is, and nothing is rounded.
    """
    if a.shape[0] == 1:
        column = tl.sum(a.to(tl.float32), 0)[:, None]
        return plus(acc, tl.sum(column * b.to(tl.float32), 0)[None, :])
    else:
        return tl.dot(
            a.to(arithmetic.dtype),
            b.to(arithmetic.dtype),
            acc,
            input_precision=arithmetic.precision,
        )


@triton.jit
def inner_product(a, b, acc, arithmetic):
    """acc + a @ b^T."""
    if a.shape[0] == 1:
        return plus(acc, tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[None, :])
    else:
        return product(a, tl.trans(b), acc, arithmetic)


@triton.jit
def outer_product(a, b, acc, arithmetic):
    """acc + a^T @ b."""
    if a.shape[0] == 1:
        column = tl.sum(a.to(tl.float32), 0)[:, None]
        return plus(acc, column * b.to(tl.float32))
    else:
        return product(tl.trans(a), b, acc, arithmetic)


@triton.jit
def plus(acc, x):
    """acc + x; acc may be None."""
    if acc is None:
        return x
    else:
        return acc + x


@triton.jit
def load_weight_slice(f, head, first, BLOCK: tl.constexpr):
    """Rows [first, first + BLOCK) of a head's weight, [BLOCK, f.block]."""
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, f.block)
    pointers = f.weight + (head // f.group).to(tl.int64) * (f.head_dim * f.width)
    pointers += row[:, None] * f.width + column[None, :]
    mask = (row < f.head_dim)[:, None] & (column < f.width)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def split_weight(weight, arithmetic):
    """An fp32 weight as operands of products."""
    high = weight.to(arithmetic.dtype)
    if arithmetic.dtype == tl.float32:
        return Split(high, None)
    else:
        return Split(high, (weight - high.to(tl.float32)).to(arithmetic.dtype))


@triton.jit
def load_weight(f, head, arithmetic, BLOCK_D: tl.constexpr):
    """The weight of a resident map, split, to be kept; None for others."""
    if f.weight is None:
        return None
    elif f.resident:
        return split_weight(load_weight_slice(f, head, 0, BLOCK_D), arithmetic)
    else:
        return None


@triton.jit
def add_projection(x, weight, z, arithmetic):
    """z + x W; z may be None."""
    z = product(x, weight.high, z, arithmetic)
    if weight.low is not None:
        z = product(x, weight.low, z, arithmetic)
    return z


@triton.jit
def in_width(f, y, other):
    """y, with ``other`` in the columns that only fill up the tile."""
    if f.width == f.block:
        return y
    else:
        return tl.where((tl.arange(0, f.block) < f.width)[None, :], y, other)


@triton.jit
def project_slices(rows, valid, f, head, arithmetic):
    """x W, f.slice columns of x and rows of W at a time."""
    z = tl.zeros((rows.shape[0], f.block), tl.float32)
    for first in range(0, f.head_dim, f.slice):
        column = first + tl.arange(0, f.slice)
        mask = valid[:, None] & (column < f.head_dim)[None, :]
        part = tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)
        weight = split_weight(load_weight_slice(f, head, first, f.slice), arithmetic)
        z = add_projection(part, weight, z, arithmetic)
    return z


@triton.jit
def project(x, rows, valid, weight, f, head, arithmetic):
    """z = x W (+ b) (+ x), for favor x W - |x|^2 / 2, fp32 [tokens, f.block].

    x: [tokens, BLOCK_D]. Where the weight is not resident, ``rows`` are read again in slices.
    """
    if f.weight is None:
        z = x.to(tl.float32)
    elif f.resident:
        z = add_projection(x, weight, None, arithmetic)
    else:
        z = project_slices(rows, valid, f, head, arithmetic)
    if f.bias is not None:
        column = tl.arange(0, f.block)
        bias = f.bias + (head // f.group) * f.width + column
        z += tl.load(bias, mask=column < f.width, other=0.0)[None, :]
    if f.skip:
        z += x.to(tl.float32)  # f == D, the same tile
    if f.activation == FAVOR:
        wide = x.to(tl.float32)
        z -= 0.5 * tl.sum(wide * wide, 1)[:, None]
    return z


@triton.jit
def exponential(z, f):
    """exp(z - max z), for softmax divided by its sum: one side, of z or of -z."""
    top = tl.max(in_width(f, z, -INF), 1)[:, None]
    y = in_width(f, tl.exp2(z * LOG2E - top * LOG2E), 0.0)
    if f.activation == SOFTMAX:
        y *= (1.0 / tl.sum(y, 1))[:, None]
    return y


@triton.jit
def at_least(x, floor):
    """max(x, floor), and NaN of NaN."""
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate_side(z, f):
    """act(z), not yet clamped; the other side of a two-sided map is that of -z."""
    if f.activation == SOFTMAX or f.activation == EXP:
        return exponential(z, f)
    elif f.activation == ELU1:
        return in_width(f, tl.where(z > 0, 1.0 + z, tl.exp2(tl.minimum(z, 0.0) * LOG2E)), 0.0)
    elif f.activation == RELU:
        return at_least(z, 0.0)
    elif f.activation == FAVOR:
        root = tl.sqrt(tl.full((), f.width, tl.float32))
        return in_width(f, tl.exp2(z * LOG2E) / root, 0.0)
    else:
        return z


@triton.jit
def activate(z, f):
    """act(z) of both sides, not yet clamped."""
    if f.two_sided:
        return Sides(activate_side(z, f), activate_side(-z, f))
    else:
        return Sides(activate_side(z, f), None)


@triton.jit
def clamp_side(y, f):
    """max(y, eps); identity is not clamped."""
    if f.activation == IDENTITY:
        return y
    else:
        return in_width(f, at_least(y, tl.full((), f.eps, y.dtype)), 0.0)


@triton.jit
def clamp(phi, f):
    if f.two_sided:
        return Sides(clamp_side(phi.plus, f), clamp_side(phi.minus, f))
    else:
        return Sides(clamp_side(phi.plus, f), None)


@triton.jit
def operand_side(z, f, factor, arithmetic):
    if factor is None and is_cuda():
        # Rounding keeps order, and NVIDIA's GPUs clamp two numbers of 16 bits at a time.
        return clamp_side(activate_side(z, f).to(arithmetic.dtype), f)
    else:
        return scaled(clamp_side(activate_side(z, f), f), factor).to(arithmetic.dtype)


@triton.jit
def operand(z, f, factor, arithmetic):
    """factor * phi of projected tokens, as an operand of products; a factor of None is 1.

    A side is rounded before the next is made, so that one at a time takes fp32 registers.
    """
    plus = operand_side(z, f, factor, arithmetic)
    if f.two_sided:
        return Sides(plus, operand_side(-z, f, factor, arithmetic))
    else:
        return Sides(plus, None)


@triton.jit
def clamp_backward(y, dy, f):
    """torch.clamp lets the gradient pass where y >= eps."""
    if f.activation == IDENTITY:
        return dy
    else:
        return tl.where(y >= f.eps, dy, 0.0)


@triton.jit
def exponential_backward(z, y, dy, f):
    """dz of y = exponential(z), dy being the gradient of the clamped y."""
    weighted = y * clamp_backward(y, dy, f)
    total = tl.sum(weighted, 1)[:, None]
    if f.activation == SOFTMAX:
        return weighted - y * total
    else:  # the maximum shares its gradient among ties
        top = tl.max(in_width(f, z, -INF), 1)[:, None]
        largest = in_width(f, tl.where(z == top, 1.0, 0.0), 0.0)
        return weighted - largest * (total / tl.sum(largest, 1)[:, None])


@triton.jit
def activate_backward(z, phi, d_phi, f):
    """dz, from the unclamped features and the gradient of the clamped ones."""
    if f.activation == SOFTMAX or f.activation == EXP:
        dz = exponential_backward(z, phi.plus, d_phi.plus, f)
        if f.two_sided:
            dz -= exponential_backward(-z, phi.minus, d_phi.minus, f)
        return dz
    elif f.activation == ELU1:
        return clamp_backward(phi.plus, d_phi.plus, f) * tl.where(z > 0, 1.0, phi.plus)
    elif f.activation == RELU:
        return tl.where(z > 0, clamp_backward(phi.plus, d_phi.plus, f), 0.0)
    elif f.activation == FAVOR:
        return phi.plus * clamp_backward(phi.plus, d_phi.plus, f)
    else:
        return d_phi.plus


@triton.jit
def dot_rows(a, b):
    """The sum over all features of a * b, [tokens]; b's sides may be [f] or [tokens, f]."""
    total = tl.sum(a.plus * b.plus, 1)
    if a.minus is not None:
        total += tl.sum(a.minus * b.minus, 1)
    return total


@triton.jit
def scaled(y, factor):
    """y * factor; a factor of None is 1."""
    if factor is None:
        return y
    else:
        return y * factor


@triton.jit
def times(phi, factor):
    """phi * factor; a factor of None is 1."""
    if factor is None:
        return phi
    elif phi.minus is None:
        return Sides(phi.plus * factor, None)
    else:
        return Sides(phi.plus * factor, phi.minus * factor)


@triton.jit
def keep_rows(phi, keep):
    """phi in the rows of ``keep``, zero in the others."""
    if phi.minus is None:
        return Sides(tl.where(keep[:, None], phi.plus, 0.0), None)
    else:
        return Sides(
            tl.where(keep[:, None], phi.plus, 0.0), tl.where(keep[:, None], phi.minus, 0.0)
        )
