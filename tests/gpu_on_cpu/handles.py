"""The interpreter's values: NumPy arrays with a Triton dtype, in which bf16 is stored as uint16."""

from __future__ import annotations

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

from .rounding import bf16_to_fp32, fp32_to_bf16

WIDE_FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
_np_dtype_of_scalar = functools.cache(stock._get_np_dtype)


def np_dtype(dtype: tl.dtype) -> np.dtype:
    """As the stock one, which makes a new table for every call."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    return _np_dtype_of_scalar(scalar)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def numbers_of(handle: TensorHandle) -> np.ndarray:
    """What the handle's elements are worth: bf16 as fp32, anything else as it is."""
    return bf16_to_fp32(handle.data) if is_bf16(handle) else handle.data


def handle_of(numbers: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Numbers rounded to a dtype."""
    if dtype == tl.bfloat16:
        return TensorHandle(fp32_to_bf16(numbers), dtype)
    return TensorHandle(numbers.astype(np_dtype(dtype), copy=False), dtype)


def undefined(shape: tuple[int, ...], dtype: tl.dtype) -> TensorHandle:
    """What a load without ``other`` leaves in masked lanes is undefined: NaN or a large integer."""
    if dtype.is_floating() and dtype in WIDE_FLOATS:
        return handle_of(np.full(shape, np.nan, np.float32), dtype)
    of_bytes = np.frombuffer(b"\x01" * 8, np_dtype(dtype))[:1]
    return TensorHandle(np.broadcast_to(of_bytes, shape).copy(), dtype)
