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
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

from . import sanitizer
from .rounding import (
    bf16_to_fp32,
    fp32_to_bf16,
    fp32_to_bf16_toward_zero,
    tf32_nearest,
    tf32_toward_zero,
)

_PRECISION = stock._ir.INPUT_PRECISION
_TOWARD_ZERO = stock._ir.ROUNDING_MODE.RTZ
_ANY_GPU = GPUTarget("cuda", 80, 32)  # the smallest products do not depend on it
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, of all GPUs
_np_dtype_of_scalar = functools.cache(stock._get_np_dtype)
_WIDE_FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
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
    stock._get_np_dtype = _np_dtype


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    """As the stock one, which makes a new table for every call."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    return _np_dtype_of_scalar(scalar)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _numbers(handle: TensorHandle) -> np.ndarray:
    """What the handle's elements are worth: bf16 as fp32, anything else as it is."""
    return bf16_to_fp32(handle.data) if _is_bf16(handle) else handle.data


def _handle(numbers: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Numbers rounded to a dtype."""
    if dtype == tl.bfloat16:
        return TensorHandle(fp32_to_bf16(numbers), dtype)
    return TensorHandle(numbers.astype(_np_dtype(dtype), copy=False), dtype)


class Builder(stock.InterpreterBuilder):
    """Stock operators on numbers instead of bits, and memory that is checked.

    A result in bf16 is the fp32 result rounded once more. That second rounding is harmless for
    + - * / and sqrt, because 24 bits are at least 2 * 8 + 2, so it equals a GPU's single one.
    """

    launch: sanitizer.Launch  # while one runs

    # arithmetic

    def binary_op(self, lhs, rhs, op):
        if _is_bf16(lhs) or _is_bf16(rhs):
            result = op(_numbers(lhs), _numbers(rhs))
            return _handle(result, tl.int1 if result.dtype == np.bool_ else tl.bfloat16)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        return _handle(op(_numbers(arg)), arg.dtype.scalar)

    def ternary_op(self, lhs, rhs, other, op):
        if op is not np.where and _is_bf16(other):
            return _handle(op(_numbers(lhs), _numbers(rhs), _numbers(other)), tl.bfloat16)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        product = np.multiply(_numbers(x), _numbers(y), dtype=np.float64)  # exact
        return _handle(product + _numbers(z), tl.bfloat16)

    def create_erf(self, arg):
        return TensorHandle(torch.erf(torch.from_numpy(arg.data)).numpy(), arg.dtype.scalar)

    # casts

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if _is_bf16(src) or target == tl.bfloat16:
            if src.dtype.scalar == target:
                return TensorHandle(src.data, target)
            return _handle(_numbers(src), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in _WIDE_FLOATS or target not in _WIDE_FLOATS:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if rounding_mode != _TOWARD_ZERO:
            return self.cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return TensorHandle(fp32_to_bf16_toward_zero(_numbers(src)), target)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    # products

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.primitive_bitwidth == 8 and a.dtype.is_floating():
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        accumulator = np.result_type(d.data.dtype, np.float32 if a.dtype.is_floating() else d.data)
        left, right = (_numbers(x).astype(accumulator, copy=False) for x in (a, b))
        precision = input_precision if a.dtype.scalar == tl.float32 else _PRECISION.IEEE
        return _handle(_PRODUCTS[precision](left, right) + _numbers(d), d.dtype.scalar)

    # memory

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        address = self._checked(self.launch.load, ptrs, mask.data)
        # A single ``other`` of zero is false and arrives as None as well.
        if other is None and mask.data.size > 1 and not mask.data.all():
            other = _undefined(ptrs.data.shape, ptrs.get_element_ty())
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
        if _is_bf16(val):
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


def _undefined(shape: tuple[int, ...], dtype: tl.dtype) -> TensorHandle:
    """What a load without ``other`` leaves in masked lanes is undefined: NaN or a large integer."""
    if dtype.is_floating() and dtype in _WIDE_FLOATS:
        return _handle(np.full(shape, np.nan, np.float32), dtype)
    of_bytes = np.frombuffer(b"\x5a" * 8, _np_dtype(dtype))[:1]
    return TensorHandle(np.broadcast_to(of_bytes, shape).copy(), dtype)


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


_PRODUCTS = {
    _PRECISION.IEEE: np.matmul,
    _PRECISION.BF16x3: functools.partial(_product_of_bf16, parts=2),
    _PRECISION.BF16x6: functools.partial(_product_of_bf16, parts=3),
    _PRECISION.TF32: _product_tf32,
    _PRECISION.TF32x3: _product_3xtf32,
}


def _is_half(tensor: tl.tensor) -> bool:
    return tensor.dtype.scalar in (tl.float16, tl.bfloat16)


class _Combining:
    """Combines whole slices at once, where the stock interpreter walks over single elements."""

    def combine(self, earlier: list[np.ndarray], later: list[np.ndarray], dtypes) -> list:
        def tensors(arrays):
            return [self.to_tensor(a, t) for a, t in zip(arrays, dtypes, strict=True)]

        combined = self.combine_fn(*tensors(earlier), *tensors(later))
        combined = combined if isinstance(combined, tuple | tl.tuple) else (combined,)
        as_tensor = stock.interpreter_semantic.to_tensor
        shape = earlier[0].shape
        return [np.broadcast_to(as_tensor(value).handle.data, shape) for value in combined]


class Reduce(_Combining, stock.ReduceOps):
    """Reductions; those of 16-bit floats round after every step, as a GPU's do.

    The order of the sums is a tree over neighbours. A GPU's depends on the layout.
    """

    def apply_impl(self, input):
        first = input[0]
        if self.combine_fn is tl.standard._sum_combine and not _is_half(first):
            return self.sum(first)
        if self.combine_fn in _EXTREMES:
            return self._extreme(first, *_EXTREMES[self.combine_fn])
        if self.combine_fn in _ARG_EXTREMES:
            return self._arg_extreme(first, *_ARG_EXTREMES[self.combine_fn])
        return self._tree(input)

    def _extreme(self, tensor, of_floats, of_integers):
        numbers = _numbers(tensor.handle)
        reduce = of_floats if numbers.dtype.kind == "f" else of_integers
        best = reduce.reduce(numbers, axis=self.axis, keepdims=self.keep_dims)
        return self._tensor(best, tensor.dtype)

    def _arg_extreme(self, tensor, extreme, position, worst):
        """The first position of the extreme; NaNs lose, as in the comparisons of Triton's own."""
        numbers = _numbers(tensor.handle)
        if numbers.dtype.kind == "f":
            numbers = np.where(np.isnan(numbers), numbers.dtype.type(worst), numbers)
        where = position(numbers, axis=self.axis, keepdims=self.keep_dims)
        return self._extreme(tensor, *extreme), self._tensor(where, tl.int32)

    def _tensor(self, numbers, dtype):
        if dtype.scalar == tl.bfloat16:
            numbers = fp32_to_bf16(numbers)
        return self.to_tensor(numbers, dtype)

    def _tree(self, input):
        dtypes = [tensor.dtype for tensor in input]
        arrays = [tensor.handle.data for tensor in input]
        rank, axis = arrays[0].ndim, self.axis
        if axis is None:
            arrays, axis = [array.reshape(-1) for array in arrays], 0
        arrays = [np.moveaxis(array, axis, 0) for array in arrays]
        while len(arrays[0]) > 1:  # blocks have powers of two
            even, odd = [array[0::2] for array in arrays], [array[1::2] for array in arrays]
            arrays = self.combine(even, odd, dtypes)
        arrays = [array[0] for array in arrays]
        if self.keep_dims:
            axes = tuple(range(rank)) if self.axis is None else self.axis
            arrays = [np.expand_dims(array, axes) for array in arrays]
        return [self.to_tensor(a, t) for a, t in zip(arrays, dtypes, strict=True)]


_EXTREMES = {
    tl.standard._elementwise_max: (np.fmax, np.maximum),
    tl.standard._elementwise_min: (np.fmin, np.minimum),
}
_LARGEST = ((np.fmax, np.maximum), np.argmax, -np.inf)
_SMALLEST = ((np.fmin, np.minimum), np.argmin, np.inf)
_ARG_EXTREMES = {
    tl.standard._argmax_combine_tie_break_left: _LARGEST,
    tl.standard._argmax_combine_tie_break_fast: _LARGEST,
    tl.standard._argmin_combine_tie_break_left: _SMALLEST,
    tl.standard._argmin_combine_tie_break_fast: _SMALLEST,
}


class Scan(_Combining, stock.ScanOps):
    """Scans; those of 16-bit floats and of the user's own functions in log2(n) steps."""

    def apply_impl(self, input):
        builtin = self.combine_fn in (tl.standard._sum_combine, tl.standard._prod_combine)
        if builtin and not _is_half(input[0]):
            return super().apply_impl(input)
        dtypes = [tensor.dtype for tensor in input]
        arrays = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in input]
        if self.reverse:
            arrays = [array[::-1] for array in arrays]
        distance = 1
        while distance < len(arrays[0]):
            earlier = [np.roll(array, distance, 0) for array in arrays]
            combined = self.combine(earlier, arrays, dtypes)
            arrays = [
                np.concatenate([array[:distance], new[distance:]])
                for array, new in zip(arrays, combined, strict=True)
            ]
            distance *= 2
        if self.reverse:
            arrays = [array[::-1] for array in arrays]
        arrays = [np.ascontiguousarray(np.moveaxis(array, 0, self.axis)) for array in arrays]
        return [self.to_tensor(a, t) for a, t in zip(arrays, dtypes, strict=True)]


class Executor(stock.GridExecutor):
    """Runs a launch's programs one after another, under the checks that are switched on."""

    def __call__(self, *args, **kwargs):
        bound = _signature(self.fn).bind(
            *args, **{name: v for name, v in kwargs.items() if name in self.arg_names}
        )
        bound.apply_defaults()
        launch = sanitizer.Launch(self.fn.__name__)
        values = {name: self._value(launch, name, v) for name, v in bound.arguments.items()}
        grid = self.grid(values) if callable(self.grid) else self.grid
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
