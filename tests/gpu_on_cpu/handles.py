"""The interpreter's values: NumPy arrays with a Triton dtype; bf16 is stored as uint16, fp8 as
uint8."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

from .rounding import bf16_to_fp32, fp8_to_fp32, fp32_to_bf16, fp32_to_fp8

WIDE_FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
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
    """What the handle's elements are worth: bf16 and fp8 as fp32, anything else as it is."""
    if is_bf16(handle):
        return bf16_to_fp32(handle.data)
    if (dtype := FP8.get(handle.dtype.scalar)) is not None:
        return fp8_to_fp32(handle.data, dtype)
    return handle.data


def handle_of(numbers: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Numbers rounded to a dtype."""
    if dtype == tl.bfloat16:
        return TensorHandle(fp32_to_bf16(numbers), dtype)
    if dtype in FP8:
        return TensorHandle(fp32_to_fp8(numbers, FP8[dtype]), dtype)
    return TensorHandle(numbers.astype(np_dtype(dtype), copy=False), dtype)


def undefined(shape: tuple[int, ...], dtype: tl.dtype) -> TensorHandle:
    """What a load without ``other`` leaves in masked lanes is undefined: NaN or a large integer."""
    if dtype in WIDE_FLOATS or dtype in FP8:
        return handle_of(np.full(shape, np.nan, np.float32), dtype)
    of_bytes = np.frombuffer(b"\x01" * 8, np_dtype(dtype))[:1]
    return TensorHandle(np.broadcast_to(of_bytes, shape).copy(), dtype)
