"""What lolcats_ops.cupy uses of CuPy, in CPU memory: NVRTC compiles, with the options that CuPy
adds, and gpu_on_cpu.ptx runs the PTX, which finds races and accesses out of bounds."""

from __future__ import annotations

from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from gpu_on_cpu.ptx import PtxKernel, Struct

from . import nvrtc

CUPY_ADDS = ("-ftz=true", "--device-as-default-execution-space", "-arch=compute_80")


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    device: int = 0
    stream: int = 0


launches: list[Launch] = []


class Device:
    entered: ClassVar = [0]

    def __init__(self, id: int):
        self.id = id

    def __enter__(self) -> None:
        self.entered.append(self.id)

    def __exit__(self, *exception: object) -> None:
        self.entered.pop()


class ExternalStream:
    entered: ClassVar = [0]

    def __init__(self, ptr: int):
        self.ptr = ptr

    def __enter__(self) -> None:
        self.entered.append(self.ptr)

    def __exit__(self, *exception: object) -> None:
        self.entered.pop()


class ndarray(np.ndarray):
    """An array of NumPy, but not for lolcats_ops."""

    live: ClassVar = WeakValueDictionary()
    device: Any = None  # instead of NumPy's

    def __new__(cls, shape: Any, dtype: Any, memptr: Any, strides: Any) -> ndarray:
        return super().__new__(cls, shape, dtype, memptr.memory, strides=strides)

    def __array_finalize__(self, source: Any) -> None:
        self.device = source.device if isinstance(source, ndarray) else Device(Device.entered[-1])
        self.live[id(self)] = self

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.__array_interface__["data"][0])


def alloc(size: int) -> Any:
    """Memory that is NaN as floats of any width."""
    memory = np.full(size, 0xFF, np.uint8)
    return SimpleNamespace(ptr=memory.ctypes.data, memory=memory)


def asarray(array: Any) -> ndarray:
    return np.array(array).view(ndarray)


def asnumpy(array: ndarray) -> np.ndarray:
    return array.view(np.ndarray)


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]):
        self.code, self.options, self.names = code, options, name_expressions

    def get_function(self, name: str) -> RawKernel:
        assert name in self.names
        return RawKernel(name, _compiled(self.code, self.options, name))


@cache
def _compiled(code: str, options: tuple[str, ...], name: str) -> PtxKernel:
    return PtxKernel(nvrtc.build(code, (*options, *CUPY_ADDS), name).ptx)


class RawKernel:
    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, name: str, compiled: PtxKernel):
        self.name, self.compiled = name, compiled

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int) -> None:
        (blocks,), (threads,), (params,) = grid, block, args
        assert params.size == 1, "a NumPy array goes by value if it has one element"
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "more has not been asked for"
        where = (Device.entered[-1], ExternalStream.entered[-1])
        launches.append(Launch(self.name, blocks, threads, *where))
        struct = Struct(params.tobytes(), _arrays_in(params.tobytes()))
        self.compiled((blocks,), [struct], shared_bytes=shared_mem, threads=threads).assert_clean()


def _arrays_in(params: bytes) -> dict[int, np.ndarray]:
    """The arrays whose addresses are in the params, by where."""
    by_size = sorted(ndarray.live.values(), key=lambda array: array.nbytes)
    starts = {array.data.ptr: array for array in by_size}  # of views of one start, the largest
    words = np.frombuffer(params[: len(params) // 8 * 8], np.uint64).tolist()
    return {8 * i: asnumpy(starts[word]) for i, word in enumerate(words) if word in starts}


def module() -> ModuleType:
    """To be imported as cupy; ``launches`` has what it has been asked to launch."""
    launches.clear()
    cupy = ModuleType("cupy")
    vars(cupy).update(ndarray=ndarray, RawModule=RawModule, asarray=asarray, asnumpy=asnumpy)
    cupy.launches = launches
    cupy.cuda = SimpleNamespace(
        Device=Device,
        ExternalStream=ExternalStream,
        alloc=alloc,
        get_current_stream=lambda: ExternalStream(ExternalStream.entered[-1]),
        runtime=SimpleNamespace(
            CUDARuntimeError=RuntimeError,
            getDeviceCount=lambda: 2,
            cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
            deviceGetAttribute=lambda attribute, device: 163 * 1024,  # of sm_80
        ),
    )
    return cupy
