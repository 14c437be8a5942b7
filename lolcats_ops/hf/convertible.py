"""Which attention layers of a model can be converted, and why others cannot."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import lolcats_ops as lo
from lolcats_ops.hf.attention import attention_of
from lolcats_ops.hf.config import LolcatsConfig

# Of layer_types: attention to all earlier tokens, or to those of a window, beyond which what is
# linear may go. Chunks, which begin anew, are no windows.
_KNOWN_KIND = re.compile("^(full_)?attention$|^sliding")
_NEEDED = ("layer_idx", "head_dim", "num_key_value_groups", "o_proj")


def convertible_layers(model: PreTrainedModel, config: LolcatsConfig) -> list[Any]:
    """The attention modules to convert.

    Raises:
        TypeError: the model is none of transformers.
        ValueError: it, or one of these layers, cannot be converted.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"convert: model is {name}, needs a transformers PreTrainedModel")
    reason = _of_model(model)
    if reason is None:
        modules = _causal_attention(model)
        reason = _of_all(model, modules, config)
    if reason is None:
        modules = _wanted(model, modules, config)
        reason = _of_wanted(model, modules, config)
    if reason is not None:
        raise ValueError(f"convert: {name} cannot be converted: {reason}")
    return modules


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, either of which quantized weights may be."""
    return itertools.chain(module.parameters(), module.buffers())


# What stands in the way, or None.


def _of_model(model: PreTrainedModel) -> str | None:
    if any(attention_of(module) is not None for module in model.modules()):
        return "it is converted already; restore it first"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, which attends to more than the tokens before"
    if model.config.get_text_config(decoder=True) is not model.config:
        return (
            "it is composite; convert its language model on its own (which will not load "
            "converted: keep its `lolcats` parameters by state_dict, and convert after loading)"
        )
    if getattr(model.config, "is_causal", True) is False:
        return "its attention is not causal (is_causal=False)"
    if getattr(model.config, "attn_logit_softcapping", None):
        return "it caps attention scores (attn_logit_softcapping)"
    return None


def _of_all(model: PreTrainedModel, modules: list[Any], config: LolcatsConfig) -> str | None:
    if not modules:
        return f"it has no causal attention module with {', '.join(_NEEDED)}"
    if not (model._supports_attention_backend or all(_dispatches(m) for m in modules)):
        return "its attention is not dispatched through transformers' AttentionInterface"
    if any(m.layer_idx is None for m in modules):
        return "it applies an attention module as several layers"
    layers = {m.layer_idx for m in modules}
    if outside := set(config.softmax_layers) - layers:
        return (
            f"softmax_layers names {sorted(outside)}, but it attends in its layers {sorted(layers)}"
        )
    return None


def _of_wanted(model: PreTrainedModel, modules: list[Any], config: LolcatsConfig) -> str | None:
    if not modules:
        return "softmax_layers leaves no layer to convert"
    sharing = [m.layer_idx for m in _causal_attention(model) if _shares_keys(m)]
    if any(_shares_keys(m) for m in modules):
        return (
            f"layers {sorted(sharing)} share cached keys and values, which a recurrent state does "
            "not keep; they can be softmax_layers"
        )
    if any(getattr(m, "sinks", None) is not None for m in modules):
        return "its attention has learned sink logits"
    kinds = _kinds(model)
    of_modules = {kinds[m.layer_idx] for m in modules if m.layer_idx < len(kinds)}
    if others := sorted(kind for kind in of_modules if not _KNOWN_KIND.search(kind)):
        return (
            f"its layers of type {', '.join(others)} do not attend all earlier tokens, or cache "
            "more than keys and values; they can be softmax_layers"
        )
    return _of_projections(modules) or _of_sizes(modules, config)


def _of_projections(modules: list[Any]) -> str | None:
    for projection in (m.o_proj for m in modules):
        if not hasattr(projection, "in_features") or next(tensors_of(projection), None) is None:
            return (
                f"its o_proj, a {type(projection).__module__}.{type(projection).__name__}, lacks "
                "in_features, or tensors that say on which device it is (if by quantize_dynamic: "
                "convert first)"
            )
    offloaded = [
        m.layer_idx
        for m in modules
        if next(tensors_of(m.o_proj)).is_meta and hasattr(m.o_proj, "_hf_hook")
    ]
    if offloaded:
        return (
            f"its layers {offloaded} are offloaded; load it with a device_map that keeps attention "
            "in memory, or convert it before it is dispatched"
        )
    return None


def _of_sizes(modules: list[Any], config: LolcatsConfig) -> str | None:
    for head_dim in {m.head_dim for m in modules}:
        choice = lo.backend_for(
            "hybrid_attention", head_dim=head_dim, feature_dim=config.feature_dim, **config.kind
        )
        if choice.backend is None:
            reason, _, _ = choice.why.partition("; backend=")  # which is no argument here
            return f"head_dim={head_dim}, feature_dim={config.feature_dim}: {reason}"
    return None


def _causal_attention(model: PreTrainedModel) -> list[Any]:
    return [
        m
        for m in model.modules()
        if getattr(m, "is_causal", False) and all(hasattr(m, name) for name in _NEEDED)
    ]


def _wanted(model: PreTrainedModel, modules: list[Any], config: LolcatsConfig) -> list[Any]:
    """Without softmax_layers, and without local layers where there are others."""
    local = {i for i, kind in enumerate(_kinds(model)) if "sliding" in kind or "chunked" in kind}
    keep = set(config.softmax_layers) | (local if len(local) < len(modules) else set())
    return [m for m in modules if m.layer_idx not in keep]


def _kinds(model: PreTrainedModel) -> list[str]:
    return getattr(model.config, "layer_types", None) or []


def _shares_keys(module: Any) -> bool:
    return any(getattr(module, r, False) for r in ("is_kv_shared_layer", "store_full_length_kv"))


def _dispatches(module: nn.Module) -> bool:
    """Whether its forward pass looks attention up in transformers' registry: not all models with
    layers of other kinds, such as Qwen3-Next, say so themselves."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())
