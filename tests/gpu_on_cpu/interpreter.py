"""Triton's interpreter with the arithmetic of a GPU and with checks: ``install()``.

The interpreter of Triton 3.9 (TRITON_INTERPRET=1) computes on the bits of bf16 numbers as if they
were integers, truncates fp32 to bf16, multiplies tf32 operands in full fp32, keeps a launch's float
arguments as Python floats, loads zeros where a mask is off, and reads and writes whatever a pointer
points at. ``install`` replaces the parts that do so. The rest runs as Triton wrote it.

    TRITON_INTERPRET=1 in the environment, before triton is imported
    interpreter.install()
    kernel[grid](tensors on the CPU)       # bounds are checked from now on
    with sanitizer.checked(races=True, order=7):
        kernel[grid](...)

Autotuning is not supported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.amd.compiler import HIPOptions
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDAOptions, min_dot_size
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

from . import sanitizer
from .handles import FP8, WIDE_FLOATS, handle_of, is_bf16, np_dtype, numbers_of, undefined
from .products import PRODUCTS
from .reductions import Reduce, Scan
from .rounding import fp32_to_bf16_toward_zero, fp32_to_fp16_toward_zero, fused_bf16

_PRECISION = stock._ir.INPUT_PRECISION
_TOWARD_ZERO = stock._ir.ROUNDING_MODE.RTZ
_TRUNCATIONS = {tl.bfloat16: fp32_to_bf16_toward_zero, tl.float16: fp32_to_fp16_toward_zero}
_ANY_GPU = GPUTarget("cuda", 80, 32)  # the smallest products do not depend on it
_LAUNCH_OPTIONS = {option.name for kind in (CUDAOptions, HIPOptions) for option in fields(kind)}
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, of all GPUs
_ACQUIRES = {stock._ir.MEM_SEMANTIC.ACQUIRE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE}
_RELEASES = {stock._ir.MEM_SEMANTIC.RELEASE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE}


def install() -> None:
    """Replaces the interpreter's parts; calling it again changes nothing.

    Raises RuntimeError where kernels are compiled rather than interpreted.
    """
    if not isinstance(tl.sum, stock.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 in the environment before triton is imported")
    stock.interpreter_builder.__class__ = Builder
    stock.GridExecutor = Executor
    stock.ReduceOps = Reduce
    stock.ScanOps = Scan
    stock.interpreter_builder.codegen_fns["min_dot_size"] = min_dot_size(_ANY_GPU)
    stock.InterpretedFunction.__call__ = _call_device_function
    stock._get_np_dtype = np_dtype


class Builder(stock.InterpreterBuilder):
    """Stock operators on numbers instead of bits, and memory that is checked.

    A result in bf16 is the fp32 result rounded once more. That second rounding is harmless for
    + - * / and sqrt, because 24 bits are at least 2 * 8 + 2, so it equals a GPU's single one.
    """

    launch: sanitizer.Launch  # while one runs

    # arithmetic

    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs) or is_bf16(rhs):
            result = op(numbers_of(lhs), numbers_of(rhs))
            return handle_of(result, tl.int1 if result.dtype == np.bool_ else tl.bfloat16)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        return handle_of(op(numbers_of(arg)), arg.dtype.scalar)

    def ternary_op(self, lhs, rhs, other, op):
        if op is not np.where and is_bf16(other):
            return handle_of(op(numbers_of(lhs), numbers_of(rhs), numbers_of(other)), tl.bfloat16)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        if not is_bf16(z):
            return super().create_fma(x, y, z)
        return TensorHandle(fused_bf16(*map(numbers_of, (x, y, z))), tl.bfloat16)

    def create_erf(self, arg):
        return TensorHandle(torch.erf(torch.from_numpy(arg.data)).numpy(), arg.dtype.scalar)

    # casts

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return TensorHandle(src.data, target)
        if tl.bfloat16 in (source, target) or source in FP8 or target in FP8:
            return handle_of(numbers_of(src), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        if not {source, target} <= {*WIDE_FLOATS, *FP8}:
            raise NotImplementedError(f"{source} to {target}")
        if rounding_mode != _TOWARD_ZERO:
            return self.cast_impl(src, dst_type)
        toward_zero = _TRUNCATIONS.get(target)
        if source == tl.float64 or toward_zero is None:
            raise NotImplementedError(f"{source} to {target}, toward zero")
        return TensorHandle(toward_zero(numbers_of(src)), target)

    # products

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        accumulator = np.result_type(d.data.dtype, np.float32 if a.dtype.is_floating() else d.data)
        left, right = (numbers_of(x).astype(accumulator, copy=False) for x in (a, b))
        precision = input_precision if a.dtype.scalar == tl.float32 else _PRECISION.IEEE
        return handle_of(PRODUCTS[precision](left, right) + numbers_of(d), d.dtype.scalar)

    # memory

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        address = self._checked(self.launch.load, ptrs, mask.data)
        # A single ``other`` of zero is false and arrives as None as well.
        if other is None and mask.data.size > 1 and not mask.data.all():
            other = undefined(ptrs.data.shape, ptrs.get_element_ty())
        return super().create_masked_load(address, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        address = self._checked(self.launch.store, ptrs, mask.data)
        return super().create_masked_store(address, value, mask, cache_policy)

    def create_atomic_load(self, ptr, mask, sem, scope):
        address = self._checked_atomic(ptr, mask.data, sem)
        return super().create_masked_load(address, mask, None, None, True)

    def create_atomic_store(self, ptr, val, mask, sem, scope):
        address = self._checked_atomic(ptr, mask.data, sem)
        return super().create_masked_store(address, val, mask, None)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        address = self._checked_atomic(ptr, np.ones_like(ptr.data, bool), sem)
        return super().create_atomic_cas(address, cmp, val, sem, scope)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        address = self._checked_atomic(ptr, mask.data, sem)
        if is_bf16(val):
            return self._add_bf16(rmwOp, address, val, mask)
        return super().create_atomic_rmw(rmwOp, address, val, mask, sem, scope)

    def _add_bf16(self, operation, address, val, mask):
        """One lane after another, since lanes may share an address."""
        if operation != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError("of the bf16 atomics only add exists")
        before = np.zeros(val.data.shape, np.uint16)
        for lane in zip(*np.nonzero(mask.data), strict=True):
            one = tuple(slice(index, index + 1) for index in lane)
            pointer = TensorHandle(address.data[one], address.dtype)
            active = TensorHandle(mask.data[one], tl.int1)
            old = super().create_masked_load(pointer, active, None, None, True)
            before[one] = old.data
            new = self.binary_op(old, TensorHandle(val.data[one], val.dtype), np.add)
            super().create_masked_store(pointer, new, active, None)
        return TensorHandle(before, tl.bfloat16)

    def _checked(self, access, ptrs, mask):
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        return TensorHandle(access(ptrs.data, mask, size), ptrs.dtype)

    def _checked_atomic(self, ptrs, mask, sem):
        atomic = functools.partial(
            self.launch.atomic, acquires=sem in _ACQUIRES, releases=sem in _RELEASES
        )
        return self._checked(atomic, ptrs, mask)


class Executor(stock.GridExecutor):
    """Runs a launch's programs one after another, under the checks that are switched on."""

    def __call__(self, *args, **kwargs):
        own = {name: v for name, v in kwargs.items() if name not in _LAUNCH_OPTIONS}
        bound = _signature(self.fn).bind(*args, **own)
        bound.apply_defaults()
        launch = sanitizer.Launch(self.fn.__name__)
        values = {name: self._value(launch, name, v) for name, v in bound.arguments.items()}
        grid = self.grid(bound.arguments) if callable(self.grid) else self.grid
        if not isinstance(grid, Sequence) or not 1 <= len(grid) <= 3:
            raise TypeError(f"{self.fn.__name__}: the grid is {grid}, needs 1 to 3 integers")
        grid = tuple(map(int, grid)) + (1,) * (3 - len(grid))
        if any(count > most for count, most in zip(grid, _MOST_PROGRAMS, strict=True)):
            raise ValueError(f"{self.fn.__name__}: no GPU launches a grid of {grid}")
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        builder = stock.interpreter_builder
        builder.launch = launch
        builder.options = stock.InterpreterOptions(  # debug: device_assert asserts
            debug=True,
            sanitize_overflow=launch.checks.overflow,
            allowed_dot_input_precisions=("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"),
        )
        builder.set_grid_dim(*grid)
        with _language_of_the_interpreter(), np.errstate(all="ignore"):
            for program in launch.programs(grid):
                builder.set_grid_idx(*program)
                self.fn(**values)

    def _value(self, launch: sanitizer.Launch, name: str, value: Any) -> Any:
        if name in self.constexprs:
            return value
        if isinstance(value, float):
            # Compiled kernels get fp32, which also decides what bf16 * argument promotes to.
            return tl.tensor(TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return stock._implicit_cvt(launch.adopt(name, value))


@functools.cache
def _signature(fn) -> inspect.Signature:
    return inspect.signature(fn)


def _call_device_function(function, *args, **kwargs):
    """A call within a launch, whose language is patched already and whose errors speak plainly."""
    return function.rewrite()(*args, **kwargs)


@contextlib.contextmanager
def _language_of_the_interpreter() -> Iterator[None]:
    """triton.language with NumPy behind it; found out once, because finding it takes 10 ms."""
    changes = _language_changes()
    for owner, name, _, interpreted in changes:
        setattr(owner, name, interpreted)
    try:
        yield
    finally:
        for owner, name, original, _ in changes:
            if original is stock._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@functools.cache
def _language_changes() -> list[tuple[object, str, object, object]]:
    sees_all = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    scope = stock._patch_lang(sees_all)
    originals: dict[tuple[int, str], tuple[object, str, object]] = {}
    for owner, name, original in scope._changes:
        originals.setdefault((id(owner), name), (owner, name, original))
    changes = [(*change, vars(change[0])[change[1]]) for change in originals.values()]
    scope.restore()
    return changes


assert triton.__version__ >= "3.9", "older interpreters differ in the parts that are replaced here"
