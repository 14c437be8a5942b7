"""Errors against the fp64 reference, and the tolerances of SPEC 9."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lolcats_ops.state import HybridState

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 3.3e-3,
}


def assert_close(
    name: str, got: Tensor, want: Tensor, dtype: torch.dtype, *, factor: float = 1, floor: float = 0
) -> None:
    """||got - want|| <= tolerance * max(||want||, floor), and no entry is off by ten times as much.

    Compared on the CPU, in fp64, wherever the two are.
    ``dtype`` is that of the activations: it decides the tolerance, also of what is kept in fp32.
    """
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, not {list(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().cpu(), want.cpu()
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} not finite"
    tolerance = factor * TOLERANCE[dtype]
    difference = got.double() - want
    size = max(want.norm().item(), floor)
    error = difference.norm().item()
    assert error <= tolerance * size, f"{name}: error {error / (size or 1):.2e} > {tolerance:.1e}"
    # Errors of a gradient that vanishes peak where the gradient does, not evenly.
    peak = want.abs().max().item() / (want.norm().item() or math.inf)
    largest = size * max(peak, want.numel() ** -0.5)
    error = difference.abs().max().item()
    assert error <= 10 * tolerance * largest, (
        f"{name}: largest error {error / (largest or 1):.2e} > {10 * tolerance:.1e}"
    )


def live_ring(state: HybridState, p: int) -> Tensor:
    """Keys and values of sequence p's positions [folded, length), in order: [Hk, n, D + V]."""
    positions = torch.arange(int(state.folded[p]), int(state.length[p]), device=state.length.device)
    slots = positions % max(state.ring, 1)
    return torch.cat([state.k_ring[p][:, slots], state.v_ring[p][:, slots]], -1)


def assert_same_state(got: HybridState, want: HybridState, dtype: torch.dtype) -> None:
    """Equal sums, to rounding, and the same live keys and values; stale slots do not matter."""
    assert got.length.tolist() == want.length.tolist()
    assert got.folded.tolist() == want.folded.tolist()
    floor = want.length.sum().item() ** 0.5
    assert_close("kv", got.kv, want.kv.double(), dtype, floor=floor)
    assert_close("ksum", got.ksum, want.ksum.double(), dtype, floor=floor)
    for p in range(want.batch):
        sinks = min(int(want.length[p]), want.sink)
        for name in ("k_sink", "v_sink"):
            a, b = getattr(got, name)[p, :, :sinks], getattr(want, name)[p, :, :sinks]
            assert torch.equal(a.double(), b.double()), f"{name} of sequence {p}"
        a, b = live_ring(got, p), live_ring(want, p)
        assert torch.equal(a.double(), b.double()), f"ring of sequence {p}"
