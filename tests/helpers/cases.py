"""The conformance matrix of SPEC 9: cases that cover every pair of values, and their inputs.

Inputs are representable in bf16 and fp16, unless a case says otherwise of the weights of the maps,
so one fp64 reference serves every dtype exactly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lolcats_ops.features import Features

WINDOWS = (0, 1, 16, 64, 256)
LENGTHS: Mapping[str, Callable[[int], int]] = {
    "w-1": lambda w: max(w - 1, 0),
    "w": lambda w: w,
    "w+1": lambda w: w + 1,
    "2w": lambda w: 2 * w,
    "3w+7": lambda w: 3 * w + 7,
}
FACTORS: Mapping[str, Sequence[Any]] = {
    "length": ("0", "1", *LENGTHS, "500", "1000", "2048"),
    "D": (16, 32, 60, 64, 80, 96, 128, 256),
    "V": ("D", 20, 72),
    "f": ("D", 24, 64),
    "G": (1, 3, 4, 8),
    "batch": ((1, 1), (2, 1), (3, 2)),  # B, Hk
    "window": WINDOWS,
    "window_kind": ("sliding", "terrace"),
    "sink": (0, 1, 4),
    "affine": (False, True),
    "activation": ("softmax", "exp", "elu1", "relu", "identity", "favor"),
    "two_sided": (True, False),
    "bias": (False, True),
    "skip": (False, True),
    "shared": ("neither", "k", "q and k"),  # whose map is per key/value head
    "layout": ("plain", "transposed", "strided"),
    "packing": (None, "left", "right", "packed"),
    "normalize": (True, False),
    "initial": (False, True),  # an initial state
    "xent": (False, True),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Case:
    """One point of the matrix."""

    length: str = "3w+7"  # one of LENGTHS, or tokens
    D: int = 16
    V: int | str = "D"
    f: int | str = "D"
    G: int = 1
    batch: tuple[int, int] = (2, 2)
    window: int = 16
    window_kind: str = "sliding"
    sink: int = 0
    affine: bool = False
    activation: str | None = "softmax"  # None: q and k are the features
    two_sided: bool = True
    bias: bool = False
    skip: bool = False
    shared: str = "neither"
    layout: str = "plain"
    packing: str | None = None
    normalize: bool = True
    initial: bool = False
    xent: bool = False
    trained: bool = False  # weights of 24 bits, which bf16 and fp16 do not hold
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """The differences from the plainest case."""
        plain = Case(dtype=torch.float64)
        values = ((n, getattr(self, n)) for n in FACTORS)
        parts = (
            f"{n}={v}".removeprefix("dtype=torch.") for n, v in values if v != getattr(plain, n)
        )
        return ",".join(parts).replace(" ", "")

    @property
    def T(self) -> int:
        of_window = LENGTHS.get(self.length)
        return of_window(self.window) if of_window else int(self.length)

    @property
    def windows(self) -> dict[str, Any]:
        return {"window": self.window, "window_kind": self.window_kind, "sink": self.sink}


def is_possible(case: Mapping[str, Any]) -> bool:
    """Whether a (partial) assignment makes sense and its reference fits into a small machine."""
    batch, kv_heads = case.get("batch", (1, 1))
    heads = batch * kv_heads * case.get("G", 1)
    length = case.get("length")
    if length in ("500", "1000", "2048") and heads > {"500": 8, "1000": 3, "2048": 1}[length]:
        return False
    if case.get("window") == 256 and length in ("2w", "3w+7") and heads > 8:
        return False
    if case.get("packing") == "packed" and batch > 1:
        return False
    if case.get("skip") and (case.get("f", "D") != "D" or case.get("activation") == "favor"):
        return False
    return not (case.get("bias") and case.get("activation") == "favor")


def covering(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Few assignments in which every possible pair of values of two factors occurs."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if is_possible({a: x, b: y})
    }
    order = sorted(missing, key=str)
    rng.shuffle(order)
    for pair in order:
        if pair not in missing:
            continue
        case = dict(pair)
        for name in rng.sample(names, len(names)):
            if name in case:
                continue
            possible = [v for v in factors[name] if is_possible({**case, name: v})]
            gains = {
                v: sum(_pair(names, (name, v), item) in missing for item in case.items())
                for v in rng.sample(possible, len(possible))
            }
            case[name] = max(gains, key=gains.__getitem__)
        missing -= set(itertools.combinations([(n, case[n]) for n in names], 2))
        yield case


def _pair(names: list[str], a: tuple[str, Any], b: tuple[str, Any]) -> tuple[Any, Any]:
    return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)


def cases(*factors: str, **others: Sequence[Any]) -> list[Case]:
    """A covering array over these factors, with the values of FACTORS or ``others``."""
    return [Case(**values) for values in covering({n: FACTORS[n] for n in factors} | others)]


@dataclass
class Inputs:
    """fp64 inputs of an operator, exact in the dtypes that the kernels take them in."""

    case: Case
    leaves: dict[str, Tensor]  # what gradients are taken of
    sequences: dict[str, Tensor]

    def as_dtype(self, dtype: torch.dtype, layout: str, device: str = "cpu") -> Inputs:
        """Activations in ``dtype`` and ``layout``, the rest in fp32 (fp64 for fp64)."""
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {
            name: lay_out(x.to(device, dtype), layout)
            if name in ("q", "k", "v")
            else x.to(device, wide)
            for name, x in self.leaves.items()
        }
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        sequences = {name: x.to(device) for name, x in self.sequences.items()}
        return Inputs(self.case, leaves, sequences)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.leaves["q"], self.leaves["k"], self.leaves["v"]

    def features(self, which: str) -> Features | None:
        """feature_q or feature_k."""
        case = self.case
        if case.activation is None:
            return None
        weight, bias = self.leaves[f"weight_{which}"], self.leaves.get(f"bias_{which}")
        return Features(weight, bias, case.activation, case.two_sided, case.skip)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Inputs of about unit size."""
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads = case.batch
    heads, D, T = kv_heads * case.G, case.D, case.T
    V = D if case.V == "D" else int(case.V)
    f = D if case.f == "D" else int(case.f)
    heads_q = kv_heads if case.shared == "q and k" else heads
    heads_k = heads if case.shared == "neither" else kv_heads

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return exact(torch.randn(*shape, generator=rng) * scale)

    def weight(*shape: int) -> Tensor:
        if not case.trained:
            return sign(normal(*shape, scale=D**-0.5))
        return sign(torch.randn(*shape, generator=rng) * D**-0.5).double()

    # Signed features would make denominators of either sign, near zero: ill-posed for any kernel.
    sign = torch.abs if case.activation in ("identity", None) else torch.clone
    # The norm is in favor's exponent: keep exp(-|x|^2 / 2) away from the floor.
    size = D**-0.25 if case.activation == "favor" else 1.0
    leaves = {
        "q": sign(normal(batch, heads, T, D, scale=size)),
        "k": sign(normal(batch, kv_heads, T, D, scale=size)),
        "v": normal(batch, kv_heads, T, V),
        "gate": normal(heads),
    }
    if case.activation is not None:
        leaves["weight_q"] = weight(heads_q, D, f)
        leaves["weight_k"] = weight(heads_k, D, f)
        if case.bias:
            leaves["bias_q"] = sign(normal(heads_q, f))
            leaves["bias_k"] = sign(normal(heads_k, f))
    inputs = Inputs(case, leaves, _sequences(case, rng))
    if case.initial:
        phi_k = inputs.features("k")
        sums = (kv_heads, D) if phi_k is None else (phi_k.heads, phi_k.out_features)
        bounds = inputs.sequences.get("cu_seqlens")
        sequences = batch if bounds is None else len(bounds) - 1
        leaves["kv0"] = normal(sequences, *sums, V)
        leaves["ksum0"] = normal(sequences, *sums).abs() + 1
    return inputs


def exact(x: Tensor) -> Tensor:
    """x rounded to values that bf16 and fp16 both hold, as fp64."""
    return x.bfloat16().half().double()


def _sequences(case: Case, rng: torch.Generator) -> dict[str, Tensor]:
    T, batch = case.T, case.batch[0]
    if case.packing == "packed":
        bounds = sorted(min(b, T) for b in (0, 0, 1, T // 3, T // 3, T))
        return {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    if case.packing is None:
        return {}
    real = torch.randint(0, T + 1, (batch, 1), generator=rng)
    real[0] = T
    mask = torch.arange(T) < real
    return {"key_padding_mask": mask if case.packing == "right" else mask.flip(1)}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; the last dimension stays contiguous."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        batch, heads, length, width = x.shape
        room = x.new_full((batch, length, heads + 1, width + 3), float("nan"))
        view = room[:, :, :heads, 3:].transpose(1, 2)
        return view.copy_(x)
    return x.contiguous()
