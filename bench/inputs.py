"""Random inputs of a case."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lolcats_ops.features import Features, init_weight
from lolcats_ops.state import HybridState

from .cases import Case


@dataclass(frozen=True)
class Inputs:
    """What an implementation computes with; ``tensors`` by the names of the public functions."""

    case: Case
    tensors: dict[str, Tensor]
    state: HybridState | None  # of a step: what it remembers of ``case.T`` tokens

    @property
    def q(self) -> Tensor:
        """[B, H, T, D]; one token for a step."""
        return self.tensors["q"]

    @property
    def k(self) -> Tensor:
        """[B, Hk, T, D]."""
        return self.tensors["k"]

    @property
    def v(self) -> Tensor:
        """[B, Hk, T, V]."""
        return self.tensors["v"]

    @property
    def gate(self) -> Tensor:
        """[H]."""
        return self.tensors["gate"]

    @property
    def maps(self) -> tuple[Features, ...]:
        """(feature_q, feature_k), empty where q and k are the features."""
        names = ("weight_q", "weight_k") if self.case.f else ()
        return tuple(Features(self.tensors[name]) for name in names)

    def wide(self) -> Inputs:
        """The same values in fp64, for the reference."""
        state = None
        if self.state is not None:
            wide = {
                name: x.double() if x.is_floating_point() else x.clone()
                for name, x in self.state.tensors.items()
            }
            state = HybridState(**wide, window=self.state.window)
        tensors = {n: t.detach().double() for n, t in self.tensors.items()}
        return Inputs(self.case, tensors, state)

    def head(self, b: int, h: int) -> Inputs:
        """One head of a sequence, as a case of its own; not of a step."""
        case = replace(self.case, B=1, H=1, Hk=1)
        key = h * self.case.Hk // self.case.H
        tensors = {
            name: t[b : b + 1, i : i + 1] if t.ndim == 4 else t[i : i + 1]
            for name, t in self.tensors.items()
            for i in [key if name in ("k", "v") else h]
        }
        return Inputs(case, tensors, None)

    def cache(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hk, T, D], [B, Hk, T, V] that softmax attention would remember.

        Made anew, alike each time: with many sequences it is most of a machine's memory.
        """
        case, dtype = self.case, getattr(torch, self.case.dtype)
        rng = torch.Generator(self.q.device).manual_seed(1)

        def normal(width: int) -> Tensor:
            shape = (case.B, case.Hk, case.T, width)
            x = torch.empty(shape, dtype=dtype, device=rng.device).normal_(generator=rng)
            return x.to(self.q.dtype)

        return normal(case.D), normal(case.V)


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Normal activations, maps near the identity, gates near one half."""
    rng = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    T = 1 if case.pass_ == "step" else case.T

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    rows = {
        "q": normal(case.B, case.H, T, case.D),
        "k": normal(case.B, case.Hk, T, case.D),
        "v": normal(case.B, case.Hk, T, case.V),
    }
    if not case.f:  # features are positive
        rows |= {"q": rows["q"].abs(), "k": rows["k"].abs()}
    tensors = {name: x.to(dtype) for name, x in rows.items()}
    tensors["gate"] = normal(case.H)
    if case.f:
        for name in ("weight_q", "weight_k"):
            eye = init_weight(case.H, case.D, case.f, device=device)
            tensors[name] = eye + normal(*eye.shape) * 0.5 * case.D**-0.5
    return Inputs(case, tensors, _state(case, dtype, rng) if case.pass_ == "step" else None)


def _state(case: Case, dtype: torch.dtype, rng: torch.Generator) -> HybridState:
    device = rng.device
    state = HybridState.empty(
        case.B, case.H, case.Hk, case.D, case.V, case.F,
        window=case.window, dtype=dtype, device=device,
    )  # fmt: skip
    state.k_ring.normal_(generator=rng)
    state.v_ring.normal_(generator=rng)
    folded = max(0, case.T - case.window)
    state.length.fill_(case.T)
    state.folded.fill_(folded)
    if folded:
        state.kv.normal_(std=folded**0.5 / case.F, generator=rng)
        state.ksum.uniform_(0.5, 1.5, generator=rng).mul_(folded / case.F)
    return state
