"""Compiles what the Triton operators launch, for a GPU that is not there; run as a script.

The operators run on CPU tensors with Triton's driver replaced and every launch compiled instead, so
that what is compiled is what a call would launch. Prints the kernels' names.
"""

import sys

import torch
import triton
from gpu_on_cpu.compiler import driver_for
from lolcats_ops.kernels import triton as kernels
from lolcats_ops.kernels.triton import launch

H, HK, T, D = 8, 2, 1024, 64
CODES = (0, True, False, 1e-12)  # two-sided softmax
WINDOWS = ((64, 0, 0), (48, 1, 1), (0, 0, 0))


def compile_only(kernel, grid, args, options):
    kernel.warmup(*args, grid=grid, **options)
    print(kernel.fn.__name__)


def operators(dtype):
    """One call of every operator, and of its gradient, for several windows."""
    q, k = torch.zeros(1, H, T, D, dtype=dtype), torch.zeros(1, HK, T, D, dtype=dtype)
    weight, gate, one = torch.zeros(H, D, D), torch.zeros(H), torch.zeros(())
    maps = (weight, None, weight, None)
    y = kernels.feature_map(q, weight, None, *CODES)
    kernels.feature_map_backward(y, q, weight, None, *CODES)
    linear = (q, k, k, *maps, None, None, None, None)
    out, den, _, _ = kernels.linear_attention(*linear, 1.0, True, 0.0, *CODES)
    kernels.linear_attention_backward(q, None, None, *linear, out, den, 1.0, True, 0.0, *CODES)
    for window in WINDOWS:
        inputs, settings = (q, k, k, *maps, gate, None, None), (*window, 0.125, False, *CODES)
        saved = kernels.hybrid_attention(*inputs, *settings)
        kernels.hybrid_attention_backward(q, *inputs, *saved, *settings)
    for xent in (False, True):
        _, _, _, *saved = kernels.attention_transfer(*inputs, xent, *settings)
        kernels.attention_transfer_backward(one, one, *inputs, *saved, xent, *settings)
    new = (q[:, :, :1].contiguous(), k[:, :, :1].contiguous(), k[:, :, :1].contiguous())
    ring = [torch.zeros(1, HK, n, D, dtype=dtype) for n in (64, 64, 1, 1)]
    state = torch.zeros(1, H, 2 * D, D), torch.zeros(1, H, 2 * D), *ring
    length = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    step = (64, 0, 0.125, False, *CODES)
    kernels.hybrid_attention_step_(*new, *maps, gate, *state, *length, None, None, None, *step)


if __name__ == "__main__":
    launch._run = compile_only
    for target in sys.argv[1:]:
        triton.runtime.driver.set_active(driver_for(target))
        operators(torch.bfloat16)
