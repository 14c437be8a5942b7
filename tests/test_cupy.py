"""lolcats_ops.cupy: with CuPy where there is a GPU, and everywhere with a stand-in, whose kernels
NVRTC compiles and gpu_on_cpu.ptx runs."""

import ctypes
import importlib
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import nvrtc, operators, stand_in_cupy
from helpers.cases import Case, make_inputs
from helpers.compare import assert_close
from helpers.stand_in_cupy import Launch

import lolcats_ops as lo
from lolcats_ops import _C, _cuda_sources, _libraries
from lolcats_ops.state import HybridState

BF16 = torch.bfloat16


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def lcp(request, monkeypatch):
    """lolcats_ops.cupy, as it is imported with CuPy or with the stand-in."""
    if request.param == "cupy":
        if not pytest.importorskip("cupy.cuda").is_available():
            pytest.skip("CuPy has no GPU")
    elif nvrtc.library() is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    else:
        monkeypatch.setitem(sys.modules, "cupy", stand_in_cupy.module())
    sys.modules.pop("lolcats_ops.cupy", None)
    module = importlib.import_module("lolcats_ops.cupy")
    if _C.can_launch_cuda():
        module.install_launcher()  # in the place of the kernels that this build has
    yield module
    sys.modules.pop("lolcats_ops.cupy")
    vars(lo).pop("cupy")
    _C.set_cuda_launcher(None)


def assert_launched(lcp, *launches):
    if hasattr(lcp.cupy, "launches"):  # CuPy itself does not tell
        assert lcp.cupy.launches == list(launches)


class OnTensors:
    """The functions of lolcats_ops.cupy for tests that have tensors."""

    def __init__(self, lcp):
        self.lcp = lcp

    def __getattr__(self, name):
        function = getattr(self.lcp, name)
        return lambda *args, **settings: self.to_torch(
            function(*map(self.to_cupy, args), **{n: self.to_cupy(x) for n, x in settings.items()})
        )

    def to_cupy(self, value):
        if isinstance(value, torch.Tensor) and value.dtype == BF16:
            bits = value.detach().view(torch.int16).numpy()
            return self.lcp.cupy.asarray(bits.view(ml_dtypes.bfloat16))
        if isinstance(value, torch.Tensor):
            return self.lcp.cupy.asarray(value.detach().numpy())
        if isinstance(value, lo.Features):
            parameters = (self.to_cupy(value.weight), self.to_cupy(value.bias))
            settings = (value.activation, value.two_sided, value.skip, value.eps)
            return self.lcp.Features(*parameters, *settings)
        if isinstance(value, HybridState):  # of linear attention
            return self.to_cupy(value.kv), self.to_cupy(value.ksum)
        return value

    def to_torch(self, value):
        if isinstance(value, tuple):
            out, state = value
            kv, ksum = map(self.to_torch, state)
            return self.to_torch(out), SimpleNamespace(kv=kv, ksum=ksum)
        assert isinstance(value, self.lcp.cupy.ndarray)
        array = self.lcp.cupy.asnumpy(value)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(BF16)
        return torch.from_numpy(array)


# A strip of feature_map is 32 tokens; a block of an attention has 64 columns of V.
CASES = [
    (
        operators.feature_map,
        Case(D=24, f=12, G=3, bias=True),  # 55 tokens of 2 x 6 heads
        Launch("lol::cuda::feature_map<float, true>", 24, 256),
    ),
    (
        operators.hybrid_attention,
        Case(D=60, f=24, V=20, G=3, batch=(1, 1), sink=1, dtype=BF16),
        Launch("lol::cuda::hybrid_attention<lol::bf16, 64, 64, 2, 64, 64, 1>", 3, 128),
    ),
    (
        operators.linear_attention,
        Case(D=64, f=64, V=72, G=2, batch=(2, 1), initial=True, dtype=BF16),
        Launch("lol::cuda::linear_attention<lol::bf16, 64, 64, 2, 64, 64, 1>", 8, 128),
    ),
    (
        operators.hybrid_attention,
        Case(D=64, f=24, V=24, batch=(1, 1), sink=1, activation="relu", dtype=torch.float16),
        Launch("lol::cuda::hybrid_attention<lol::f16, 64, 64, 2, 32, 64, 2>", 1, 256),
    ),
]


@pytest.mark.parametrize(
    ("call", "case", "launch"), CASES, ids=lambda x: getattr(x, "__name__", "")
)
def test_functions_are_their_reference_in_one_launch(lcp, call, case, launch):
    want = operators.expected(call, case).outputs
    inputs = make_inputs(case).as_dtype(case.dtype, "transposed")
    for name, y in call(OnTensors(lcp), inputs).items():
        assert_close(name, y, want[name].detach(), case.dtype, floor=1e-3)
    assert_launched(lcp, launch)


def test_steps_on_a_pool_of_states_equal_one_call(lcp):
    case = Case(D=16, V=20, f=8, G=2, window=5, sink=1, shared="k")
    x = make_inputs(case)
    want = operators.hybrid_attention(lo.reference, x)["out"]
    on_cupy = OnTensors(lcp)
    x = x.as_dtype(torch.float32, "plain")
    q, k, v, feature_q, feature_k, gate = map(
        on_cupy.to_cupy, (*x.qkv, x.features("q"), x.features("k"), x.leaves["gate"])
    )
    state = lcp.HybridState.empty_for(k, v, feature_k, batch=3, window=5, sink=1, slack=1)
    slots = lcp.cupy.asarray(np.array([2, 0], np.int32))
    for start, stop in ((0, 15), (15, 16), (16, case.T)):
        rows = (array[:, :, start:stop] for array in (q, k, v))
        out = lcp.hybrid_attention_step_(
            *rows, feature_q, feature_k, gate, state, state_indices=slots
        )
        got = on_cupy.to_torch(out)
        assert_close(f"tokens {start} to {stop}", got, want[:, :, start:stop], torch.float32)
    assert lcp.cupy.asnumpy(state.length).tolist() == [case.T, 0, case.T]
    launch = Launch("lol::cuda::hybrid_attention_step<float, 16, 8, 4, true>", 4, 256)
    assert_launched(lcp, *[launch] * 3)


@pytest.fixture
def call(lcp):
    """A function with arguments that it takes, in whichever changed."""

    def call(x=None, weight=None, function=lcp.feature_map, dtype=np.float32, **settings):
        x = lcp.cupy.asarray(np.ones((1, 2, 5, 8), dtype)) if x is None else x
        weight = lcp.cupy.asarray(np.ones((2, 8, 4), np.float32)) if weight is None else weight
        return function(x, lcp.Features(weight), **settings)

    return call


def test_results_are_where_arguments_are_and_ordered_like_them(lcp, call):
    x = lcp.cupy.asarray(np.ones((1, 5, 2, 8), np.float16)).transpose(0, 2, 1, 3)
    y = call(x)
    assert isinstance(y, lcp.cupy.ndarray)
    assert y.dtype == np.float16
    assert y.transpose(0, 2, 1, 3).flags.c_contiguous


def test_calls_run_on_the_device_of_their_arrays_and_its_current_stream(lcp, call):
    cuda = lcp.cupy.cuda
    if not hasattr(lcp.cupy, "launches"):
        pytest.skip("CuPy itself does not tell")
    with cuda.Device(1):
        x, weight = (lcp.cupy.asarray(np.ones(n, np.float32)) for n in ((1, 1, 3, 8), (1, 8, 4)))
    with cuda.ExternalStream(0xBEEF):
        y = call(x, weight)
    assert y.device.id == 1
    launch, *others = lcp.cupy.launches
    assert (launch.device, launch.stream, others) == (1, 0xBEEF, [])
    assert cuda.Device.entered == [0]


def test_arrays_of_two_devices_are_refused(lcp, call):
    if lcp.cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    with lcp.cupy.cuda.Device(1):
        weight = lcp.cupy.asarray(np.ones((2, 8, 4), np.float32))
    with pytest.raises(ValueError, match="weight is on device 1, x on device 0"):
        call(weight=weight)


def test_arrays_of_numpy_are_refused(lcp, call):
    weight = np.ones((2, 8, 4), np.float32)
    with pytest.raises(TypeError, match=r"weight is of type numpy\.ndarray, not a CuPy array"):
        call(weight=weight)
    with pytest.raises(TypeError, match=r"cupy\.feature_map needs CuPy arrays"):
        call(np.ones((1, 2, 5, 8), np.float32), weight)


def test_wrong_dtypes_and_shapes_are_named(lcp, call):
    with pytest.raises(TypeError, match="x has dtype float64, which no operator takes"):
        call(dtype=np.float64)
    with pytest.raises(ValueError, match=r"features\.weight"):
        call(weight=lcp.cupy.asarray(np.ones((3, 8, 4), np.float32)))


def test_a_gpu_with_little_shared_memory_gets_the_kernel_that_fits(lcp, monkeypatch):
    monkeypatch.setattr(lcp, "_most_shared_bytes", lambda device: 99 * 1024)
    kernels = []
    monkeypatch.setattr(lcp, "_compiled", lambda kernel: kernels.append(kernel) or Mock())

    def attend(D, dtype):
        q = lcp.cupy.asarray(np.ones((1, 1, 5, D), dtype))
        features = lcp.Features(lcp.cupy.asarray(np.ones((1, D, 64), np.float32)))
        lcp.hybrid_attention(q, q, q, features, features, lcp.cupy.asarray(np.ones(1, np.float32)))

    attend(128, ml_dtypes.bfloat16)
    assert kernels == ["lol::cuda::hybrid_attention<lol::bf16, 128, 64, 2, 64, 32, 2>"]
    with pytest.raises(ValueError, match=r"needs \d{6} bytes .*, a block of device 0 has 101376"):
        attend(128, np.float32)


def last_error():
    """As a caller of the C library has it."""
    function = ctypes.CDLL(_libraries.get_library()).lol_last_error
    function.restype = ctypes.c_char_p
    return function().decode()


def test_the_log_of_a_failed_compilation_reaches_every_caller(lcp, call, monkeypatch):
    monkeypatch.setattr(_cuda_sources, "unit", lambda kernel: '#include "missing.cuh"\n')
    with pytest.raises(Exception, match=r'cannot open source file "missing\.cuh"') as raised:
        call()
    assert type(raised.value).__name__ in ("CompileError", "CompileException")  # NVRTC's, CuPy's
    assert 'cannot open source file "missing.cuh"' in last_error()


def test_what_a_launcher_raises_is_raised_by_the_call(lcp, call):
    def launch(kernel, *_):
        raise KeyError(kernel)

    _C.set_cuda_launcher(launch)
    with pytest.raises(KeyError, match="feature_map"):
        call()
    assert "KeyError: 'lol::cuda::feature_map<float, true>'" in last_error()


def test_without_a_gpu_the_error_says_so(lcp, call, monkeypatch):
    _C.set_cuda_launcher(None)
    if _C.can_launch_cuda():
        pytest.skip("this build has kernels of its own")
    runtime = lcp.cupy.cuda.runtime

    def fail():
        raise runtime.CUDARuntimeError("cudaErrorNoDevice")

    monkeypatch.setattr(runtime, "CUDARuntimeError", RuntimeError)
    monkeypatch.setattr(runtime, "getDeviceCount", fail)
    for function in (call, lcp.install_launcher):
        with pytest.raises(RuntimeError, match="CuPy has no GPU: cudaErrorNoDevice"):
            function()
    assert not _C.can_launch_cuda()


def test_without_cupy_the_error_says_what_to_install():
    code = "import sys; sys.modules['cupy'] = None; import lolcats_ops.cupy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (
        "ImportError: lolcats_ops.cupy needs CuPy: pip install 'cupy-cuda13x[ctk]'" in done.stderr
    )


def test_an_edit_of_any_header_changes_what_is_compiled(tmp_path, monkeypatch):
    kernel = "lol::cuda::feature_map<float, true>"
    shutil.copytree(_cuda_sources.folder(), tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(_cuda_sources, "folder", lambda: tmp_path)
    units = set()
    for edited in ("params.h", "numbers.cuh", "attention_params.h"):
        _cuda_sources._digest.cache_clear()
        units.add(_cuda_sources.unit(kernel))
        with (tmp_path / edited).open("a") as header:
            header.write("// edited\n")
    _cuda_sources._digest.cache_clear()
    assert len(units) == 3
