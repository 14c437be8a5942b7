"""The operators on CuPy arrays, by the CUDA C++ kernels: functions of :mod:`lolcats_ops.numpy`.

Forward only, in float32, float16 and, with CuPy 14 and ``ml_dtypes``, bfloat16; what a kernel does
not take, such as ``key_padding_mask``, it refuses by name. Arrays are used where they are, with any
strides, the last dimension contiguous; results are CuPy arrays. A call runs on the device of its
arrays and on CuPy's current stream of that device, and synchronises nothing, so the values behind
pointers (``gate``, ``cu_seqlens``, ``state_indices``) are not checked.

A kernel is compiled when it is first called for, which takes seconds, by NVRTC, which ``pip install
'cupy-cuda13x[ctk]'`` brings; nvcc need not be there. CuPy 14.2 and later keep what was compiled on
disk, older ones for the process. A library that was built with the kernels uses its own.

>>> import cupy  # doctest: +SKIP
>>> import lolcats_ops.cupy as lcp  # doctest: +SKIP
>>> x = cupy.random.standard_normal((1, 2, 5, 4), dtype=cupy.float32)  # doctest: +SKIP
>>> y = lcp.feature_map(x, lcp.Features(cupy.ones((2, 4, 4), cupy.float32)))  # doctest: +SKIP
>>> y.shape, y.device  # doctest: +SKIP
((1, 2, 5, 8), <CUDA Device 0>)

Raises, besides what :mod:`lolcats_ops.numpy` does:
    ImportError: there is no CuPy.
    RuntimeError: there is no GPU.
    ValueError: the GPU is too small for the kernel, or it does not take the case.
    cupy.cuda.compiler.CompileException: NVRTC's log.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from . import _C, _cuda_sources, numpy
from .numpy import Features, HybridState

try:
    import cupy
except ModuleNotFoundError as error:
    raise ImportError(
        "lolcats_ops.cupy needs CuPy: pip install 'cupy-cuda13x[ctk]', or cupy-cuda12x where the "
        "driver is of CUDA 12"
    ) from error

__all__ = [
    "Features",
    "HybridState",
    "feature_map",
    "hybrid_attention",
    "hybrid_attention_step_",
    "install_launcher",
    "linear_attention",
]

P = ParamSpec("P")
R = TypeVar("R")


def install_launcher() -> None:
    """Compile and launch the CUDA kernels of this process through CuPy, whoever calls them.

    The functions here do it themselves; ``backend="cuda"`` of torch tensors and callers of the C
    library need it where the library was built without the kernels. Calls nothing and compiles
    nothing yet. Not while another thread runs an operator on a GPU.

    Raises:
        RuntimeError: no GPU.
    """
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"lolcats_ops.cupy: CuPy has no GPU: {error}") from error
    _C.set_cuda_launcher(_launch)


def _launch(
    kernel: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    params: bytes,
    device: int,
    stream: int,
) -> str | None:
    """Why the device is too small for the kernel, or None."""
    if shared_bytes > (most := _most_shared_bytes(device)):
        return (
            f"{kernel} needs {shared_bytes} bytes of shared memory, a block of device {device} has "
            f"{most}"
        )
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream):
        function = _compiled(kernel)
        if shared_bytes > 48 * 1024:  # more has to be asked for
            # The same number from all threads, since it is one for all.
            function.max_dynamic_shared_size_bytes = most
        # A NumPy array of one element goes by value.
        struct = np.frombuffer(params, np.dtype((np.void, len(params))))
        function((blocks,), (threads,), (struct,), shared_mem=shared_bytes)
    return None


@cache
def _most_shared_bytes(device: int) -> int:
    runtime = cupy.cuda.runtime
    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device)


@cache
def _compiled(kernel: str) -> Any:
    """A RawKernel, which is compiled again for devices that it has not seen."""
    module = cupy.RawModule(
        code=_cuda_sources.unit(kernel),
        options=_cuda_sources.options(),
        name_expressions=(kernel,),
    )
    return module.get_function(kernel)


def _on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """A function of NumPy arrays as one of CuPy arrays: its arrays say where it runs."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(isinstance(argument, cupy.ndarray) for argument in (*args, *kwargs.values())):
            raise TypeError(
                f"lolcats_ops.cupy.{function.__name__} needs CuPy arrays; lolcats_ops.numpy takes "
                "those of NumPy"
            )
        if not _C.can_launch_cuda():
            install_launcher()
        return function(*args, **kwargs)

    return run


feature_map = _on_gpu(numpy.feature_map)
linear_attention = _on_gpu(numpy.linear_attention)
hybrid_attention = _on_gpu(numpy.hybrid_attention)
hybrid_attention_step_ = _on_gpu(numpy.hybrid_attention_step_)
