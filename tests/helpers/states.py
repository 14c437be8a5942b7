"""Decoding states to test: inputs, empty states, and calls between cuts."""

import itertools
from dataclasses import replace

import pytest
import torch

import lolcats_ops as lo
from helpers.cases import Case, Inputs, make_inputs
from helpers.kernels import ALL, KERNELS
from lolcats_ops.state import HybridState

on_all = pytest.mark.parametrize("backend", ALL, indirect=True)
on_kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)

# window, window_kind, sink, slack
SETTINGS = [
    (0, "sliding", 0, 0),
    (0, "sliding", 1, 2),
    (1, "sliding", 0, 1),
    (3, "sliding", 2, 0),
    (3, "terrace", 1, 2),
    (2, "terrace", 0, 0),
    (20, "sliding", 4, 3),
]
windows = pytest.mark.parametrize(
    ("window", "kind", "sink", "slack"), SETTINGS, ids=lambda value: str(value)
)


def case_of(window: int, kind: str, sink: int, **others) -> Case:
    return Case(
        "w", D=16, V=20, f=24, G=2, window=window, window_kind=kind, sink=sink, shared="k", **others
    )


def prepare(
    case: Case, length: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Inputs of ``length`` tokens that need no gradient."""
    inputs = make_inputs(replace(case, length="500"), seed).as_dtype(dtype, "transposed", device)
    cut = {n: x[:, :, :length] if x.ndim == 4 else x for n, x in inputs.leaves.items()}
    return Inputs(case, {n: x.detach() for n, x in cut.items()}, {})


def arguments(x: Inputs, start: int = 0, stop: int | None = None) -> tuple:
    rows = (t[:, :, start:stop] for t in x.qkv)
    return (*rows, x.features("q"), x.features("k"), x.leaves["gate"])


def empty_state(x: Inputs, slack: int = 0, batch: int | None = None) -> HybridState:
    q, k, v = x.qkv
    phi = x.features("k")
    sizes = (phi.heads, k.shape[1], k.shape[3], v.shape[3], phi.out_features)
    options = {**x.case.windows, "slack": slack, "dtype": q.dtype, "device": q.device}
    state = HybridState.empty(q.shape[0] if batch is None else batch, *sizes, **options)
    for ring in (state.k_ring, state.v_ring, state.k_sink, state.v_sink):
        ring.fill_(float("nan"))  # nothing may be read before it is written
    return state


def feed(x: Inputs, state: HybridState, cuts: list[int], **options) -> torch.Tensor:
    """The outputs of the calls between successive cuts, in one tensor."""
    steps = itertools.pairwise(cuts)
    calls = [lo.hybrid_attention_step_(*arguments(x, a, b), state, **options) for a, b in steps]
    return torch.cat(calls, 2)


def reference_of(x: Inputs, slack: int = 0) -> tuple[torch.Tensor, HybridState]:
    """Outputs and final state of one call, in fp64."""
    wide = Inputs(x.case, {n: t.double() for n, t in x.leaves.items()}, {})
    state = empty_state(wide, slack)
    return lo.reference.hybrid_attention_step_(*arguments(wide), state), state
