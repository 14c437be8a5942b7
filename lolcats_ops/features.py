"""The learned feature map as a value: parameters, activation and their shapes (SPEC 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from ._codes import ACTIVATIONS, TWO_SIDED
from ._sizes import check_size

LARGEST = torch.finfo(torch.float32).max
INITS = ("identity", "zero", "kaiming", "normal", "orthogonal")


def out_features(width: int, activation: str = "softmax", two_sided: bool = True) -> int:
    """F, the width after the activation: 2f for a two-sided softmax or exp, else f.

    >>> out_features(64), out_features(64, "relu")
    (128, 64)
    """
    return 2 * width if two_sided and activation in TWO_SIDED else width


def init_weight(
    heads: int,
    head_dim: int,
    width: int,
    init: str = "identity",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A feature weight [heads, head_dim, width].

    identity: eye(D, f), truncated; zero (meant with ``skip=True``, which then starts as the
    identity); kaiming: uniform within sqrt(6 / (D f)), as published; normal: N(0, 1/D); orthogonal:
    blocks of orthogonal rows with the norms of a normal matrix, the fixed projection of ``favor``.

    Raises:
        TypeError, ValueError: sizes that are no positive integers, or an unknown ``init``.

    >>> init_weight(2, 3, 4)[1]
    tensor([[1., 0., 0., 0.],
            [0., 1., 0., 0.],
            [0., 0., 1., 0.]])
    """
    for name, size in (("heads", heads), ("head_dim", head_dim), ("width", width)):
        check_size("init_weight", name, size, 1)
    weight = torch.zeros(heads, head_dim, width, dtype=dtype, device=device)
    if init == "identity":
        weight.diagonal(dim1=1, dim2=2).fill_(1.0)
        return weight
    if init == "zero":
        return weight
    if init == "kaiming":
        bound = math.sqrt(6 / (head_dim * width))
        return weight.uniform_(-bound, bound, generator=generator)
    if init == "normal":
        return weight.normal_(0, head_dim**-0.5, generator=generator)
    if init == "orthogonal":
        return _orthogonal_(weight, generator)
    raise ValueError(f"init_weight: init is {init!r}, needs one of {', '.join(INITS)}")


def check_init(caller: str, activation: str, init: str) -> None:
    """Raises ValueError where the maps of ``activation`` cannot start as ``init``.

    >>> check_init("FeatureMap", "favor", "orthogonal")
    """
    if activation == "favor" and init != "orthogonal":
        raise ValueError(
            f"{caller}: init={init!r} with activation='favor', whose projection is random and "
            "fixed: needs init='orthogonal'"
        )


def _orthogonal_(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    heads, head_dim, width = weight.shape
    for start in range(0, width, head_dim):
        block = torch.empty(heads, head_dim, head_dim, dtype=weight.dtype, device=weight.device)
        q, _ = torch.linalg.qr(block.normal_(generator=generator))
        norm = torch.empty_like(block).normal_(generator=generator).norm(dim=1, keepdim=True)
        weight[:, :, start : start + head_dim] = (q * norm)[:, :, : width - start]
    return weight


@dataclass(frozen=True, eq=False)
class Features:
    """phi(x) = clamp(act(x @ weight[h] + bias[h] (+ x if skip)), min=eps), SPEC 1.

    Args:
        weight: [Hf, D, f], one map per head; Hf is the number of query heads or of key/value heads.
        bias: [Hf, f] or None.
        activation: "softmax", "exp", "elu1", "relu", "identity" or "favor" (arXiv 2009.14794, fixed
            weight).
        two_sided: softmax and exp also take -z, which doubles the width; the other activations are
            one-sided.
        skip: adds x before the activation; needs f == D.
        eps: the clamp's floor; identity is not clamped.

    Raises:
        TypeError, ValueError: arguments that do not fit together.

    >>> import torch
    >>> phi = Features(init_weight(8, 64, 64))
    >>> phi.heads, phi.width, phi.out_features
    (8, 64, 128)
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "softmax"
    two_sided: bool = True
    skip: bool = False
    eps: float = 1e-12
    # (activation, two_sided, skip, eps) as the operators take them
    codes: tuple[int, bool, bool, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor):
            raise TypeError(f"Features: weight is a {type(self.weight).__name__}, needs a tensor")
        if self.weight.ndim != 3:
            raise ValueError(
                f"Features: weight has shape {list(self.weight.shape)}, needs [Hf, D, f]"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Features: activation is {self.activation!r}, needs one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        heads, head_dim, width = self.weight.shape
        if 0 in self.weight.shape:
            raise ValueError(
                f"Features: weight has shape {list(self.weight.shape)}, needs no 0 in it"
            )
        if self.bias is not None and not isinstance(self.bias, Tensor):
            raise TypeError(
                f"Features: bias is a {type(self.bias).__name__}, needs a tensor or None"
            )
        for name in ("two_sided", "skip"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Features: {name} is {getattr(self, name)!r}, needs a bool")
        if not isinstance(self.eps, Real):
            raise TypeError(f"Features: eps is {self.eps!r}, needs a number")
        if self.bias is not None and tuple(self.bias.shape) != (heads, width):
            raise ValueError(
                f"Features: bias has shape {list(self.bias.shape)}, needs [Hf, f] = "
                f"{[heads, width]}"
            )
        if self.skip and width != head_dim:
            raise ValueError(f"Features: skip needs f == D, but weight has D={head_dim}, f={width}")
        if self.activation == "favor" and (self.skip or self.bias is not None):
            raise ValueError("Features: favor takes neither bias nor skip")
        if not 0 <= self.eps <= LARGEST:
            raise ValueError(f"Features: eps is {self.eps}, needs a finite number of float32, >= 0")
        # One-sided activations have one meaning, whatever the flag: readers of two_sided see it.
        two_sided = self.two_sided and self.activation in TWO_SIDED
        object.__setattr__(self, "two_sided", two_sided)
        codes = ACTIVATIONS.index(self.activation), two_sided, self.skip, self.eps
        object.__setattr__(self, "codes", codes)

    @property
    def heads(self) -> int:
        """Hf."""
        return self.weight.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        """f, before the activation."""
        return self.weight.shape[2]

    @property
    def out_features(self) -> int:
        """F, after the activation."""
        return out_features(self.width, self.activation, self.two_sided)

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """(weight, bias)."""
        return self.weight, self.bias

    @property
    def kind(self) -> tuple[str, bool, bool, float, int]:
        """What the two maps of one attention must agree in."""
        return self.activation, self.two_sided, self.skip, self.eps, self.width


torch.serialization.add_safe_globals([Features])  # torch.load, which loads weights alone, may
