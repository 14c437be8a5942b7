"""What cpu/exponentials.h and simd.h say of their functions, over the range of floats."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.kernels import CPU

import lolcats_ops as lo
from lolcats_ops import _C

SOURCE = Path(__file__).parents[1] / "simd" / "accuracy.cpp"
KERNELS = Path(__file__).parents[2] / "kernels"
# Of kernels/CMakeLists.txt, as far as they bear on results.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
ISA_FLAGS = {
    "scalar": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "emulated": ("-march=x86-64-v3", "-DLOL_LANES=16"),
}
STRIDE = 31  # of 2^32 bit patterns: 270 000 of every power of two, in seconds
BOUNDS = {
    "exp_ulp": 1.5,
    "exp_below_relative": 0.01,
    "exp_above_ulp": 1.5,
    "exp_both_ways_ulp": 2.5,
    "exp_for_bf16_relative": 9e-5,
    "reciprocal_for_bf16_relative": 2**-14,
    "log_excess": 1,
    "nan_lost": 0,
}


@pytest.mark.parametrize("isa", [isa for isa in ISA_FLAGS if isa in _C.cpu_isas()])
def test_functions_keep_their_error_bounds_over_the_range_of_floats(isa, tmp_path):
    program = tmp_path / "accuracy"
    command = [os.environ.get("CXX", "g++"), *FLAGS, *ISA_FLAGS[isa], "-fopenmp", "-Wno-psabi"]
    options = (f"-I{KERNELS}", f"-DLOL_ISA={isa}", "-o", str(program))
    subprocess.run([*command, str(SOURCE), *options], check=True)
    said = subprocess.run(
        [str(program), str(STRIDE)], check=True, text=True, stdout=subprocess.PIPE
    )
    errors = dict(line.split(" ", 1) for line in said.stdout.splitlines())
    assert errors.keys() == BOUNDS.keys()
    for name, bound in BOUNDS.items():
        worst, at = errors[name].split()
        assert float(worst) <= bound, f"{name}: {worst} at {at}"


def every_number(dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """[256, 1, 1, 256] of all numbers of 16 bits, in the order of their bits from ``first`` on."""
    bits = torch.arange(first, first + 2**16).to(torch.int16)
    return bits.view(dtype).view(256, 1, 1, 256)


def means_so_far(v: torch.Tensor) -> torch.Tensor:
    """Hybrid attention with equal weights on a token and those before it, all in the window."""
    q = torch.zeros(*v.shape[:3], 16, dtype=v.dtype)
    phi = lo.Features(torch.zeros(1, 16, 4))
    return lo.hybrid_attention(q, q, v, phi, phi, torch.zeros(1), window=4, backend="cpu")


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    if got.dtype is torch.bfloat16 and _C.cpu_isa() not in ("scalar", "avx2", "avx512"):
        # vdpbf16ps and the matrix unit take subnormals for zeros.
        small = want.abs() < 2.0**-124
        got, want = (torch.where(small, 0, x) for x in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_is_read_and_rounded(backend, dtype):
    numbers, next_ones = every_number(dtype), every_number(dtype, first=1)
    assert_equal(means_so_far(numbers), numbers)
    # Sums of large bf16 may overflow fp32, by the order in which they are added and scaled.
    large = numbers.abs() > torch.finfo(torch.float32).max / 8
    for of_next in (1, 2, 3):  # a quarter, a half (a tie), three quarters of the way to the next
        v = torch.cat([numbers] * (4 - of_next) + [next_ones] * of_next, dim=2)
        want = v.double().mean(dim=2, keepdim=True).to(dtype)
        assert_equal(*(torch.where(large, 0, x) for x in (means_so_far(v)[:, :, 3:], want)))


@pytest.mark.parametrize("backend", CPU, indirect=True)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1])
class TestNaNsOfAllBits:
    """A NaN stays one, whatever its bits and wherever it is."""

    @staticmethod
    def nan(bits):
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32)

    @pytest.mark.parametrize("feature", [0, 19])
    def test_of_a_feature_map(self, backend, bits, feature):
        x, phi = torch.randn(1, 1, 4, 16), lo.Features(torch.randn(1, 16, 20), torch.zeros(1, 20))
        phi.bias[0, feature] = self.nan(bits)
        assert lo.feature_map(x, phi, backend=backend).isnan().all()

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    def test_of_attention_and_its_steps(self, backend, bits, name):
        inputs = {n: torch.randn(1, 1, 4, 16) for n in ("q", "k", "v")}
        inputs[name][..., 1, :] = self.nan(bits)
        phi = lo.Features(torch.randn(1, 16, 4))
        rest = (phi, phi, torch.zeros(1))
        out = lo.hybrid_attention(*inputs.values(), *rest, window=2, backend=backend)
        assert out[:, :, 1].isnan().all()
        state = lo.HybridState.empty(1, 1, 1, 16, 16, 8, window=2)
        for t in range(2):
            tokens = (x[:, :, t : t + 1] for x in inputs.values())
            out = lo.hybrid_attention_step_(*tokens, *rest, state, backend=backend)
            assert out.isnan().all() == (t == 1)
