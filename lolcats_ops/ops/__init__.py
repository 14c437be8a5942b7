"""One file per operator: docstring, validation, the torch.ops call, fakes, autograd and vmap."""

from ..reference import Transfer
from .attention_transfer import attention_transfer
from .feature_map import feature_map
from .hybrid_attention import hybrid_attention
from .hybrid_attention_step import hybrid_attention_step_
from .linear_attention import linear_attention
from .warmup import warmup

__all__ = [
    "Transfer",
    "attention_transfer",
    "feature_map",
    "hybrid_attention",
    "hybrid_attention_step_",
    "linear_attention",
    "warmup",
]
