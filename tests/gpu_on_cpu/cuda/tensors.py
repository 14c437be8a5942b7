"""CUDA tensors in the memory of the CPU, for a torch that was built without CUDA.

To torch they are on a CUDA device: operators are dispatched by it, and C++ sees it. Of torch's own
operators only ``empty_strided`` knows them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from .program import shared_library

DEVICES = {"cpu": 1, "cuda": 2}  # DLDeviceType
FIRST_STREAM = 1000  # of device 0, as a pointer

# The one function of CUDA builds that C++ extensions need for a launch: each device has a stream.
_LIBTORCH_CUDA = f"""
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {{
  *stream = reinterpret_cast<void*>(static_cast<long>({FIRST_STREAM} + device));
  return 0;
}}
"""


def relabelled(x: Tensor, device: torch.device | str) -> Tensor:
    """The same memory as a tensor of another device."""
    device = torch.device(device)
    capsule = to_dlpack(x.detach())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    after_data = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    label = (ctypes.c_int32 * 2).from_address(after_data)
    label[:] = DEVICES[device.type], device.index or 0
    with patch("torch.cuda._lazy_init"):  # which would say that there is no CUDA
        return from_dlpack(capsule)


@contextmanager
def cuda_tensors() -> Iterator[None]:
    """While it lasts, C++ may allocate such tensors and ask for the current stream.

    Raises:
        RuntimeError: this torch has CUDA.
    """
    if torch.version.cuda or torch.version.hip:
        raise RuntimeError(f"torch {torch.__version__} has devices of its own")
    ctypes.CDLL(str(_libtorch_cuda()))
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("empty_strided", _empty_strided, "CUDA")
        yield


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    **_: object,
) -> Tensor:
    return relabelled(torch.empty_strided(size, stride, dtype=dtype), device)


def _libtorch_cuda() -> Path:
    """Found by dlopen under the name of torch's own, once it is loaded."""
    return shared_library(_LIBTORCH_CUDA, name="libtorch_cuda.so")
