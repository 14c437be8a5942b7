"""What a converted model's attention is: one small, frozen, JSON-serialisable description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lolcats_ops._codes import ACTIVATIONS, TWO_SIDED, WINDOW_KINDS
from lolcats_ops.features import check_init

INITS = ("identity", "kaiming", "normal", "orthogonal")  # not "zero": converted layers have no skip


@dataclass(frozen=True)
class LolcatsConfig:
    """The linearized attention of a converted model (SPEC 1-3).

    Args:
        window: keys that each query attends with softmax (sliding), or half of their largest number
            (terrace).
        window_kind: "sliding" or "terrace".
        sink: first tokens that every query keeps under softmax. Pretrained models put 30-55 % of
            late layers' attention on the first token, which a feature map imitates badly.
        feature_dim: learned feature width f, at most 256; a two-sided activation doubles it.
        activation: "softmax", "exp", "elu1", "relu", "identity" or "favor".
        two_sided: features of z and of -z (softmax and exp); the other activations are one-sided.
        init: how feature weights start: "identity" (truncated), "kaiming", "normal" or
            "orthogonal". favor needs the last: one projection for q and k, which is not trained.
        gate_init: raw gate; the softmax part is weighted by its sigmoid.
        share_kv_features: one key map per key/value head, so that the recurrent state is shared by
            a group of query heads and is that much smaller; False gives each query head its own.
        affine: weight the linear part by 1 - sigmoid(gate) instead of 1.
        softmax_layers: layers left as they are.

    Raises:
        ValueError, TypeError: naming the field, its value and what it needs.

    >>> LolcatsConfig(window=128, softmax_layers=(0, 1)).window
    128
    """

    window: int = 64
    window_kind: str = "sliding"
    sink: int = 1
    feature_dim: int = 64
    activation: str = "softmax"
    two_sided: bool = True
    init: str = "identity"
    gate_init: float = 0.1
    share_kv_features: bool = False
    affine: bool = False
    softmax_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._layers("softmax_layers")
        self._integer("window", 0)
        self._integer("sink", 0)
        self._integer("feature_dim", 1)
        for name in ("two_sided", "share_kv_features", "affine"):
            self._type(name, "True or False", bool)
        self._type("gate_init", "a number", int, float)
        self._choice("window_kind", WINDOW_KINDS)
        self._choice("activation", ACTIVATIONS)
        self._choice("init", INITS)
        # One-sided activations have one meaning, whatever the flag.
        object.__setattr__(self, "two_sided", self.two_sided and self.activation in TWO_SIDED)
        check_init("LolcatsConfig", self.activation, self.init)
        if not -1e4 < self.gate_init < 1e4:
            raise ValueError(
                f"LolcatsConfig: gate_init is {self.gate_init}, needs to be finite and moderate"
            )

    def _type(self, name: str, needed: str, *allowed: type) -> None:
        value = getattr(self, name)
        # True is an int for isinstance.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise TypeError(f"LolcatsConfig: {name} is {value!r}, needs {needed}")

    def _integer(self, name: str, least: int) -> None:
        self._type(name, "an integer", int)
        if not least <= getattr(self, name) < 2**31:
            raise ValueError(
                f"LolcatsConfig: {name} is {getattr(self, name)}, needs >= {least} and below 2**31"
            )

    def _layers(self, name: str) -> None:
        given = getattr(self, name)
        layers = tuple(given) if isinstance(given, Iterable) else (None,)
        if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
            raise TypeError(f"LolcatsConfig: {name} is {given!r}, needs integers, as in (0, 1)")
        if any(layer < 0 for layer in layers):
            raise ValueError(f"LolcatsConfig: {name} is {given}, needs >= 0")
        object.__setattr__(self, name, tuple(sorted(layers)))

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(
                f"LolcatsConfig: {name} is {value!r}, needs one of {', '.join(allowed)}"
            )

    @property
    def windows(self) -> dict[str, Any]:
        """What `lo.hybrid_attention` calls these."""
        return {"window": self.window, "window_kind": self.window_kind, "sink": self.sink}

    @property
    def kind(self) -> dict[str, Any]:
        """What `lo.Features` calls these, of both maps."""
        return {"activation": self.activation, "two_sided": self.two_sided}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored under `lolcats` in a model's config.json."""
        return {**asdict(self), "softmax_layers": list(self.softmax_layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LolcatsConfig:
        """The inverse of `to_dict`; an unknown key is an error, never dropped."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"LolcatsConfig: unknown keys {', '.join(sorted(unknown))}")
        return cls(**values)
