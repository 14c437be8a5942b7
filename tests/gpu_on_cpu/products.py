"""Matrix products with the precisions of tensor cores, by the name that ``tl.dot`` gives them."""

from __future__ import annotations

import functools

import numpy as np
from triton.runtime import interpreter as stock

from .rounding import bf16_to_fp32, fp32_to_bf16, tf32_nearest, tf32_toward_zero

_PRECISION = stock._ir.INPUT_PRECISION


def _product_tf32(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Triton hands tensor cores the fp32 operands as they are: sm_80, 90 and 100 have no cvt."""
    return np.matmul(tf32_toward_zero(left), tf32_toward_zero(right))


def _product_3xtf32(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Each operand is its nearest tf32 and a rest; the product of the rests is left out."""
    big_left, big_right = tf32_nearest(left), tf32_nearest(right)
    small_left, small_right = tf32_toward_zero(left - big_left), tf32_toward_zero(right - big_right)
    small = np.matmul(small_left, big_right) + np.matmul(big_left, small_right)
    return _without_nans(small) + np.matmul(big_left, big_right)


def _without_nans(product: np.ndarray) -> np.ndarray:
    """inf - inf in a rest is no reason for a NaN in the sum; Triton clears it as well."""
    return np.where(np.isnan(product), np.float32(0), product)


def _product_of_bf16(left: np.ndarray, right: np.ndarray, parts: int) -> np.ndarray:
    """Operands are sums of bf16 numbers; products as small as what is left over are left out."""
    lefts, rights = _bf16_parts(left, parts), _bf16_parts(right, parts)
    total = np.zeros((), np.float32)
    for order in reversed(range(parts)):  # small products first
        for i in range(order + 1):
            product = np.matmul(lefts[i], rights[order - i])
            total = total + (_without_nans(product) if order else product)
    return total


def _bf16_parts(values: np.ndarray, parts: int) -> list[np.ndarray]:
    found = []
    for _ in range(parts):
        found.append(bf16_to_fp32(fp32_to_bf16(values)))
        values = values - found[-1]
    return found


PRODUCTS = {
    _PRECISION.IEEE: np.matmul,
    _PRECISION.BF16x3: functools.partial(_product_of_bf16, parts=2),
    _PRECISION.BF16x6: functools.partial(_product_of_bf16, parts=3),
    _PRECISION.TF32: _product_tf32,
    _PRECISION.TF32x3: _product_3xtf32,
}
