"""What decides which backend can run a call, and which is the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """What of a call decides which backend runs it."""

    op: str
    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    value_dim: int = 64
    feature_dim: int = 64  # f; 0 where q and k are the features
    activation: str = "softmax"
    two_sided: bool = True
    tokens: int = 1
    window: int = 64
    window_kind: str = "sliding"
    sink: int = 0
    key_padding_mask: bool = False
