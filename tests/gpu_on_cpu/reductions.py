"""``tl.reduce`` and ``tl.associative_scan`` on whole arrays, rounding 16-bit floats as they go."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from .handles import numbers_of
from .rounding import fp32_to_bf16


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
        numbers = numbers_of(tensor.handle)
        reduce = of_floats if numbers.dtype.kind == "f" else of_integers
        best = reduce.reduce(numbers, axis=self.axis, keepdims=self.keep_dims)
        return self._tensor(best, tensor.dtype)

    def _arg_extreme(self, tensor, extreme, position, worst):
        """The first position of the extreme; NaNs lose, as in the comparisons of Triton's own."""
        numbers = numbers_of(tensor.handle)
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
