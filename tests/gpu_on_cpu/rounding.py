"""Roundings of GPUs that NumPy lacks, on whole arrays."""

from __future__ import annotations

import numpy as np

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
