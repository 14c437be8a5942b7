"""The attention layers of a pretrained model, swapped in place and revertibly.

No per-model code: families that dispatch through transformers' AttentionInterface work alike. A
converted layer holds a submodule `lolcats` (its parameters), its own shallow copy of the config
(which names our attention) and a forward pre-hook (which hands the attention its cache layer).
Nothing global changes.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from lolcats_ops.hf.attention import (
    NAME,
    LolcatsAttention,
    Mode,
    attention_of,
    bounds_of,
    check_mask,
    lolcats_attention,
    packed_in_cache,
    packed_starts,
    past_differs,
)
from lolcats_ops.hf.cache import LolcatsCacheLayer, find_beside
from lolcats_ops.hf.config import LolcatsConfig
from lolcats_ops.hf.convertible import convertible_layers, tensors_of

AttentionInterface.register(NAME, lolcats_attention)


class Softmax(NamedTuple):
    """What an attention module has in softmax mode."""

    config: Any
    dropout: float | None


@torch.inference_mode(False)  # parameters made under inference mode could never train
def convert_layers(model: PreTrainedModel, config: LolcatsConfig) -> None:
    """Gives the layers that can be converted their parameters and hooks; `lo.hf.convert` without
    what the model says of itself."""
    modules = convertible_layers(model, config)
    _own_config(model)
    if dropout := max(_dropout(m) or 0.0 for m in modules):
        warnings.warn(
            f"attention_dropout={dropout} will not apply to converted layers", stacklevel=4
        )
    for module in modules:
        projection = module.o_proj
        heads = projection.in_features // _value_dim(module)
        attention = LolcatsAttention(
            heads,
            heads // module.num_key_value_groups,
            module.head_dim,
            config,
            next(tensors_of(projection)).device,
        )
        module.lolcats = attention
        module.lolcats_softmax = Softmax(module.config, _dropout(module))
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    model.base_model.register_forward_pre_hook(_before_layers, with_kwargs=True)
    set_mode(model, "hybrid")


def _value_dim(module: Any) -> int:
    """V, of which its o_proj takes one for every head."""
    return getattr(module, "v_head_dim", None) or module.head_dim


def _own_config(model: PreTrainedModel) -> None:
    """What is said of this model is not said of others that were made from the same config."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def _dropout(module: Any) -> float | None:
    """The rate that an attention module passes on, None if it has none to set."""
    rate = getattr(module, "attention_dropout", None)
    return rate if isinstance(rate, (int, float)) else None


def restore_layers(model: PreTrainedModel) -> None:
    """Takes `convert_layers` back exactly."""
    if not isinstance(getattr(model, "_orig_mod", model), PreTrainedModel):  # that is compiled
        raise TypeError(
            f"restore: model is {type(model).__name__}, needs the PreTrainedModel that it holds"
        )
    set_mode(model, "softmax")
    for module, _ in _converted(model):
        _remove(module, _before_attention)
        del module.lolcats, module.lolcats_softmax
    _remove(model.base_model, _before_layers)


def _remove(module: nn.Module, hook: Any) -> None:
    for key, registered in list(module._forward_pre_hooks.items()):
        if registered is hook:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def attention_layers(model: nn.Module) -> list[LolcatsAttention]:
    """The `lolcats` submodules of a converted model (or of one wrapped by PEFT), in layer order;
    none of a model that is not converted.

    >>> attention_layers(nn.Linear(2, 2))
    []
    >>> [layer.gate.shape for layer in attention_layers(model)]  # doctest: +SKIP
    [torch.Size([9]), torch.Size([9]), ...]
    """
    return [found for module in model.modules() if (found := attention_of(module)) is not None]


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Chooses what the converted layers compute: "hybrid", "transfer" (stage 1) or "softmax" (the
    original model).

    Raises:
        ValueError: an unknown mode, or a model that is not converted.

    >>> set_mode(model, "softmax")  # doctest: +SKIP
    >>> reference = model(input_ids).logits  # doctest: +SKIP
    """
    if mode not in get_args(Mode):
        raise ValueError(f"set_mode: mode is {mode!r}, needs one of {', '.join(get_args(Mode))}")
    for module, _ in _converted(model):
        _set_mode(module, mode)


def _set_mode(module: Any, mode: Mode) -> None:
    """The same of a converted attention module."""
    for each in module.lolcats.modules():  # itself, or the copies that PEFT made
        if isinstance(each, LolcatsAttention):
            each.mode = mode
    own: Softmax = module.lolcats_softmax
    module.config = own.config
    if own.dropout is not None:
        module.attention_dropout = own.dropout if mode == "softmax" else 0.0
    if mode != "softmax":
        module.config = copy.copy(own.config)
        module.config._attn_implementation_internal = NAME


@contextmanager
def use_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """`set_mode` for the duration of a with block.

    With gradient checkpointing, the backward pass belongs into the block: it computes layers again.

    >>> with use_mode(model, "softmax"):  # doctest: +SKIP
    ...     logits = model(input_ids).logits
    """
    before: list[tuple[Any, Mode]] = [(module, own.mode) for module, own in _converted(model)]
    set_mode(model, mode)
    try:
        yield
    finally:
        for module, own in before:
            _set_mode(module, own)


def _converted(model: nn.Module) -> list[tuple[Any, LolcatsAttention]]:
    """The converted attention modules, each with what `convert` gave it."""
    pairs = [(module, attention_of(module)) for module in model.modules()]
    found = [(module, attention) for module, attention in pairs if attention is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} is not converted: see lolcats_ops.hf.convert")
    return found


def local_window(model: nn.Module) -> int | None:
    """The smallest sliding window that converted layers have as softmax layers, and lose: their
    teacher, like their student, attends all earlier tokens."""
    windows = [_window(module) for module, _ in _converted(model)]
    return min((w for w in windows if w), default=None)


def _window(module: Any) -> int | None:
    holder = module if hasattr(module, "sliding_window") else module.config
    return getattr(holder, "sliding_window", None)


def _before_layers(
    module: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Checks masks that the caller made, before any layer changes its cache, and counts positions
    beside a padding mask as `generate` does: softmax does not depend on where a rotation begins,
    features do."""
    given = kwargs
    if args:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    _check_masks(module, given)
    mask, new = given.get("attention_mask"), _new(given)
    if (
        not isinstance(mask, torch.Tensor)
        or mask.dim() != 2
        or new is None
        or given.get("position_ids") is not None
        or not _takes_positions(type(module))
    ):
        return None
    positions = mask.to(new.device).long().cumsum(1).sub(1).clamp(min=0)
    return args, {**kwargs, "position_ids": positions[:, -new.shape[1] :]}


def _new(given: Mapping[str, Any]) -> torch.Tensor | None:
    """The tokens of a call, [B, T, ...]."""
    return next(
        (x for n in ("input_ids", "inputs_embeds") if (x := given.get(n)) is not None), None
    )


@torch.compiler.assume_constant_result
def _takes_positions(kind: type[nn.Module]) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters


def _check_masks(module: Any, given: Mapping[str, Any]) -> None:
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    layers = getattr(cache, "layers", [])
    find_beside(layers)
    if torch.compiler.is_compiling():
        return
    held = {tokens for layer in layers if (tokens := _tokens_held(layer)) is not None}
    if len(held) > 1:
        raise ValueError(
            f"this cache is half updated, its layers hold {' and '.join(map(str, sorted(held)))} "
            "tokens: an earlier call, or crop(), was interrupted; start with a fresh one"
        )
    if mask is None:
        return
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        new = _new(given)
        _check_past(mask, layers, 0 if new is None else new.shape[1])
        return
    by_kind = mask if isinstance(mask, Mapping) else None
    kinds = getattr(module.config, "layer_types", None) or {}
    for each in (mask,) if by_kind is None else by_kind.values():
        if isinstance(each, torch.Tensor):
            each.lolcats_checked = False  # type: ignore[attr-defined]  # may have changed since
    for attention, own in _converted(module):
        i = attention.layer_idx
        if own.mode != "softmax":
            read = mask if by_kind is None else by_kind.get(kinds[i]) if kinds else None
            layer = layers[i] if i < len(layers) else None
            _check_once(attention, read, layer, given.get("position_ids"))


def _tokens_held(layer: Any) -> int | None:
    """The tokens that a layer of a cache has seen, None if it is not known without asking its
    device, or is of no use: softmax layers that share the keys of others stay empty."""
    if isinstance(layer, LolcatsCacheLayer):
        return layer.cumulative_length
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        return layer.get_seq_length()
    return None


def _check_past(mask: torch.Tensor, layers: list[Any], tokens: int) -> None:
    """Holds a [B, past + T] mask to what the cache has of the past; layers have the same."""
    for layer in layers:
        if isinstance(layer, LolcatsCacheLayer) and layer.state is not None:
            if mask.shape[1] < layer.cumulative_length + tokens:
                raise ValueError(
                    f"attention_mask is of {mask.shape[1]} tokens, needs the "
                    f"{layer.cumulative_length} of earlier calls and {tokens} new ones"
                )
            shown, held = mask[:, : layer.cumulative_length], layer.state.length
            if bool((shown.count_nonzero(1).to(held.device) != held).any()):
                raise past_differs(held)
            return


def _check_once(
    module: Any, mask: Any, layer: CacheLayerMixin | None, position_ids: torch.Tensor | None
) -> None:
    """Checks a [B, H | 1, T, Tk] mask that a layer is to read, for all layers that read it."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or torch.compiler.is_compiling():
        return
    if getattr(mask, "lolcats_checked", False):
        return
    past, starts = 0 if layer is None else int(layer.get_seq_length()), None
    if not past and position_ids is not None:
        # A block-diagonal mask is right beside the positions that say the same.
        starts = packed_starts(position_ids, mask)
    state = getattr(layer, "state", None)
    check_mask(mask, past, _window(module), starts, None if state is None else state.length)
    mask.lolcats_checked = True  # type: ignore[attr-defined]


def _before_attention(
    module: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Hands the attention its cache layer, or the bounds of packed sequences."""
    mode, cache = module.lolcats.mode, kwargs.get("past_key_values")
    if mode == "softmax":
        if isinstance(cache, Cache):
            _leave_softmax_layer(cache, module.layer_idx)
        return None
    mask = kwargs.get("attention_mask")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"lolcats attention reads no {type(mask).__name__}: "
            'model.set_attn_implementation("sdpa") makes masks that it reads'
        )
    if kwargs.get("cache") is not None or (cache is not None and not isinstance(cache, Cache)):
        raise NotImplementedError(
            f"layer {module.layer_idx} keeps a recurrent state: paged caches (generate_batch, "
            "continuous batching) do not work with it, a transformers Cache does"
        )
    module.lolcats.refuse(kwargs)  # before the cache has counted any token
    layer = None
    if cache is not None:
        if mode == "transfer":
            raise ValueError("attention transfer runs without a cache: pass use_cache=False")
        if kwargs.get("cu_seq_lens_q") is not None and not torch.is_grad_enabled():
            raise packed_in_cache()
        layer = _cache_layer(cache, module.layer_idx)
    _check_once(module, mask, layer, kwargs.get("position_ids"))
    bounds, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    first = layer is None or layer.cumulative_length == 0
    if bounds is None and position_ids is not None and first:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        starts = packed_starts(position_ids, mask, hidden_states.shape[0])
        bounds = None if starts is None else bounds_of(starts)
    return args, {**kwargs, "lolcats_cache": layer, "lolcats_cu_seqlens": bounds}


def _cache_layer(cache: Cache, index: int) -> LolcatsCacheLayer:
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, LolcatsCacheLayer):
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise ValueError(
                f"layer {index}: the cache holds keys of the softmax model (or virtual tokens of "
                "prefix tuning, which a state does not take); start with a fresh one"
            )
        slack = getattr(layer, "lolcats_slack", 0)
        layer = cache.layers[index] = LolcatsCacheLayer(layer, slack)
    layer.expected = True
    return layer


def _leave_softmax_layer(cache: Cache, index: int) -> None:
    """Gives a layer in softmax mode its own cache layer back."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, LolcatsCacheLayer):
        return
    if layer.cumulative_length > 0:
        raise ValueError(
            f"layer {index}: the cache holds the state of the converted model; "
            "start with a fresh one in softmax mode"
        )
    cache.layers[index] = layer.instead_of
    layer.instead_of.lolcats_slack = layer.slack  # if the cache comes back
