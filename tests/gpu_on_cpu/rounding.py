"""Roundings of GPUs that NumPy lacks, on whole arrays."""

from __future__ import annotations

import numpy as np
import torch

# Bits of an fp32 significand that a tf32 operand has no room for.
_TF32_DROPPED = np.uint32(0x1FFF)
_TF32_HALF = np.uint32(0x1000)
_BF16_NAN = np.uint16(0x7FFF)  # what cvt.rn.bf16.f32 makes of any NaN


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 numbers stored as uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, as uint16."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    half_less_one_if_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half_less_one_if_even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), _BF16_NAN, rounded)


def fp32_to_bf16_toward_zero(values: np.ndarray) -> np.ndarray:
    """The upper half of each number, as uint16; a NaN stays one."""
    values = np.asarray(values, np.float32)
    truncated = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), _BF16_NAN, truncated)


def fp32_to_fp16_toward_zero(values: np.ndarray) -> np.ndarray:
    """As float16; what is finite stays finite, at most 65504."""
    values = np.asarray(values, np.float32)
    held = np.where(np.isfinite(values), values.clip(-65504, 65504), values)
    nearest = held.astype(np.float16)
    beyond = np.abs(nearest.astype(np.float32)) > np.abs(values)
    return np.where(beyond, (nearest.view(np.uint16) - beyond).view(np.float16), nearest)


def fused_bf16(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of bf16 numbers, rounded once, as uint16."""
    product = np.multiply(x, y, dtype=np.float64)  # exact
    z = np.asarray(z, np.float64)
    total = product + z
    behind = total - product  # of the sum's error: what each term has lost
    error = (product - (total - behind)) + (z - behind)
    wide = _to_odd(total, error, np.int64)
    narrow = wide.astype(np.float32)
    return fp32_to_bf16(_to_odd(narrow, wide - narrow, np.int32))


def _to_odd(nearest: np.ndarray, error: np.ndarray, integer: type) -> np.ndarray:
    """nearest + error rounded to odd: what rounds that once more, to less, is not misled."""
    bits = nearest.view(integer)
    inexact = np.isfinite(error) & (error != 0) & (nearest != 0) & (bits % 2 == 0)
    away = np.where((error > 0) == (nearest > 0), 1, -1).astype(integer)
    return np.where(inexact, bits + away, bits).view(nearest.dtype)


def fp8_to_fp32(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The values of fp8 numbers stored as uint8."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype).float().numpy()


def fp32_to_fp8(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """To nearest, ties to even, what is too large to the largest (cvt.rn.satfinite), as uint8."""
    most = torch.finfo(dtype).max
    wide = torch.from_numpy(np.ascontiguousarray(values, np.float32)).clamp(-most, most)
    return wide.to(dtype).view(torch.uint8).numpy()


def tf32_toward_zero(values: np.ndarray) -> np.ndarray:
    """What a tensor core makes of an fp32 operand: it does not look at the low 13 bits."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return (bits & ~_TF32_DROPPED).view(np.float32)


def tf32_nearest(values: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: to nearest, ties away from zero; infinities and NaNs stay."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + _TF32_HALF) & ~_TF32_DROPPED).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)
