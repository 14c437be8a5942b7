"""Triton kernels of the operators, with the schemas of torch.ops.lolcats_ops.

One file per operator. What they share: problem.py (the kernels' arguments), tokens.py, window.py,
features.py, map_gradient.py, state.py, past.py (device functions), forward.py and backward_*.py
(attention), attention.py, arguments.py and launch.py (tensors to programs).
"""

from .attention_transfer import attention_transfer, attention_transfer_backward
from .feature_map import feature_map, feature_map_backward
from .hybrid_attention import hybrid_attention, hybrid_attention_backward
from .hybrid_attention_step import hybrid_attention_step_
from .linear_attention import linear_attention, linear_attention_backward

__all__ = [
    "attention_transfer",
    "attention_transfer_backward",
    "feature_map",
    "feature_map_backward",
    "hybrid_attention",
    "hybrid_attention_backward",
    "hybrid_attention_step_",
    "linear_attention",
    "linear_attention_backward",
]
