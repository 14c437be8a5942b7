"""A key/value cache of constant size: `HybridState` as a cache layer of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from transformers import PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

import lolcats_ops as lo
from lolcats_ops._sizes import check_size
from lolcats_ops.hf.attention import LolcatsAttention, attention_of


class LolcatsCacheLayer(CacheLayerMixin):
    """The state of one converted layer; the same bytes after 10 tokens or 100 000.

    A converted layer announces itself (`expected`), transformers calls `update` before the
    attention, and the attention then calls `attend`. What is refused is not counted.
    """

    supports_early_init = False  # the state needs to know D and V apart
    # Once initialized, of no tokens: models ask how many there are.
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, instead_of: CacheLayerMixin, slack: int = 0):
        """A layer in the place of ``instead_of``, which is empty."""
        super().__init__()
        self.slack = slack
        self.instead_of = instead_of
        # Some static layers are initialized early: room for keys and values that will not come.
        instead_of.keys = instead_of.values = None
        instead_of.is_initialized = False
        self.beside: CacheLayerMixin | None = None  # a softmax layer that reads the same masks
        self.beside_static = False  # whether any layer beside it is a static one
        self.state: lo.HybridState | None = None
        self.expected = False  # whether a converted layer is about to call
        self.cumulative_length = 0  # with padding, which state.length leaves out
        self.waiting = 0  # tokens that came and have not been attended
        # [B, n] which of the last n tokens are real, as far back as the ring, or without slack of
        # none; None if all ever were
        self.recent: Tensor | None = None

    @property
    def is_croppable(self) -> bool:
        return self.slack > 0

    @property
    def is_compileable(self) -> bool:
        # So says a static layer; with others beside it that do not, no mask would be made for it.
        return self.beside_static

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do yet: `attend` makes the state."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Waits for the new tokens to be attended.

        Raises:
            ValueError: the layer that calls is not converted (any more).
        """
        if not self.expected:
            raise ValueError(
                "this cache is one of converted layers, and its model has others: "
                "start with a fresh one"
            )
        self.expected = False
        self.waiting = key_states.shape[2]
        return key_states, value_states

    @torch.no_grad()
    def attend(
        self,
        attention: LolcatsAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        real: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Appends the new tokens to the state and returns their outputs [B, H, T, V].

        Args:
            real: [B, T] bool, False for padding; None if there is none.
            options: `scale`, `affine` and `backend` of the operator.

        Raises:
            NotImplementedError: these tokens are in the state already.
            ValueError: another batch size or dtype than that of the tokens before.
        """
        if self.waiting != key.shape[2]:
            raise NotImplementedError(
                "this model attends more than once to what a layer has cached, as differential "
                "attention does, or applies a layer several times, which a recurrent state cannot "
                "do: pass use_cache=False"
            )
        self.waiting = 0
        state = self._state_for(attention, key, value)
        recent = self._remembered(real, key, state.ring)
        parameters = (*attention.features(), attention.gate)
        if real is None:
            out = lo.hybrid_attention_step_(query, key, value, *parameters, state, **options)
        else:
            out, state = lo.hybrid_attention(
                query,
                key,
                value,
                *parameters,
                window=state.window,
                window_kind=state.window_kind,
                sink=state.sink,
                state=state,
                return_state=True,
                key_padding_mask=real,
                **options,
            )
        if self.state is None:
            self.is_initialized = True
            self.keys, self.values = (
                x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key, value)
            )
        self.state, self.recent = state, recent
        self.cumulative_length += key.shape[2]
        return out

    def _state_for(self, attention: LolcatsAttention, key: Tensor, value: Tensor) -> lo.HybridState:
        state = self.state
        if state is None:
            self._refuse_to_continue()
            return attention.empty_state(key, value, self.slack)
        if state.batch != key.shape[0]:
            raise ValueError(
                f"the cache holds {state.batch} sequences, this call has {key.shape[0]}; "
                "batch_repeat_interleave and batch_select_indices of the cache change that"
            )
        if state.ring and state.k_ring.dtype != key.dtype:
            raise ValueError(
                f"the cache was filled in {state.k_ring.dtype} and is continued in {key.dtype}: "
                "use the same dtype, or the same autocast, for both"
            )
        return state

    def _remembered(self, real: Tensor | None, key: Tensor, most: int) -> Tensor | None:
        """Which of the last tokens are padding: the state holds nothing of them to take back."""
        if real is None and self.recent is None:
            return None
        if self.slack == 0:
            return key.new_ones((key.shape[0], 0), dtype=torch.bool)
        batch, _, tokens, _ = key.shape
        before = self.recent
        if before is None:
            before = key.new_ones((batch, self.cumulative_length), dtype=torch.bool)
        if real is None:
            real = key.new_ones((batch, tokens), dtype=torch.bool)
        return torch.cat((before, real), 1)[:, -most:]

    def leave_out(self, tokens: int) -> None:
        """Allows the new tokens to bypass the state, which has no gradient, if they are the first.

        A training forward makes a cache that nobody reads; continuing from one is the error.
        """
        self._refuse_to_continue()
        self.cumulative_length, self.waiting = tokens, 0

    def _refuse_to_continue(self) -> None:
        if self.cumulative_length > 0:
            raise RuntimeError(
                "the state of a converted layer has no gradient: "
                "fill and continue a cache under torch.no_grad()"
            )

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # A mask over the new tokens is all that a converted layer reads; softmax layers beside it
        # may be handed the same one.
        if self.beside is not None:
            return self.beside.get_mask_sizes(query_length)
        return query_length, self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.18

    def reset(self) -> None:
        self.state, self.is_initialized, self.cumulative_length, self.waiting = None, False, 0, 0
        self.recent = self.keys = self.values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back -tokens_to_remove tokens; a positive number is the length to crop to.

        Raises:
            ValueError: more than `slack` tokens, once the oldest have left the window.
        """
        n = (
            -tokens_to_remove
            if tokens_to_remove <= 0
            else self.cumulative_length - tokens_to_remove
        )
        if n <= 0 or self.state is None:
            return
        try:
            self.state.rewind(self._real_among(n))
        except ValueError as error:
            if self.slack > 0 or n > int(self.state.length.min()):
                raise
            raise ValueError(
                f"{error}; lo.hf.LolcatsCache(model, slack=...), as past_key_values of generate, "
                "keeps what it takes to take tokens back (there is none for an assistant model)"
            ) from error
        self.cumulative_length -= n
        if self.recent is not None:
            self.recent = self.recent[:, :-n]

    def _real_among(self, n: int) -> int | Tensor:
        """How many of the last n tokens of every sequence are real."""
        if self.recent is None:
            return n
        if n > self.recent.shape[1]:
            raise ValueError(
                f"{n} tokens of a padded batch cannot be taken back, needs at most the slack, "
                f"{self.slack}"
            )
        return self.recent[:, -n:].sum(1)

    def _select(self, indices: Tensor) -> None:
        if self.state is not None:
            indices = indices.to(self.state.length.device)
            self.state = self.state.select(indices)
            if self.recent is not None:
                self.recent = self.recent.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor | list[int]) -> None:
        indices = torch.as_tensor(indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self._select(torch.arange(self.state.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        """Stays on its device: its size does not grow."""

    def prefetch(self, *args: Any) -> None:
        """Nothing was offloaded."""


def find_beside(layers: list[CacheLayerMixin]) -> None:
    """Tells converted layers of the softmax layers beside them, once these hold something."""
    others = [
        layer
        for layer in reversed(layers)
        if isinstance(layer, CacheLayerMixin)
        and layer.is_initialized
        and not isinstance(layer, LolcatsCacheLayer)
    ]
    used = {_is_sliding(layer): layer for layer in others}  # what masks depend on
    static = any(layer.is_compileable for layer in others)
    for layer in layers if used else ():
        if isinstance(layer, LolcatsCacheLayer):
            layer.beside = layer.beside or used.get(_is_sliding(layer.instead_of))
            layer.beside_static = static


def _is_sliding(layer: CacheLayerMixin) -> bool:
    return getattr(layer, "is_sliding", False)


class LocalCacheLayer(DynamicSlidingWindowLayer):
    """Keys and values of a local (sliding window) layer, and of `slack` tokens before them.

    What transformers' own layer records for `crop` grows until somebody crops.
    """

    cumulative_length: int

    def __init__(self, sliding_window: int, slack: int):
        super().__init__(sliding_window)
        self.slack = slack

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = DynamicLayer.update(self, key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        kept = self.sliding_window - 1 + self.slack
        self.keys, self.values = keys[:, :, -kept:], values[:, :, -kept:]
        seen = self.sliding_window - 1 + key_states.shape[2]  # what the mask is made for
        return keys[:, :, -seen:], values[:, :, -seen:]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back -tokens_to_remove tokens.

        Raises:
            ValueError: keys of the remaining window are gone.
        """
        if not self.is_initialized:
            return
        length = self.cumulative_length + tokens_to_remove
        if self.keys.shape[2] + tokens_to_remove < min(length, self.sliding_window - 1):
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back from a sliding window, needs at "
                f"most the slack, {self.slack}"
            )
        DynamicLayer.crop(self, tokens_to_remove)
        self.cumulative_length = length


class LolcatsCache(DynamicCache):
    """A cache for a converted model from which the last `slack` tokens can be taken back.

    Plain generation needs none: converted layers put their own layer into any fresh cache. Make one
    for assisted decoding, whose slack has to be the number of tokens that are proposed at once
    (`num_assistant_tokens`, 20 unless set, or `prompt_lookup_num_tokens`), or to branch a prompt.

    Raises:
        TypeError, ValueError: `slack` is not an integer >= 0; the model is not converted.

    >>> cache = LolcatsCache(model, slack=20)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache, assistant_model=small)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, slack: int = 0):
        check_size("LolcatsCache", "slack", slack, 0)
        converted = [m.layer_idx for m in model.modules() if attention_of(m) is not None]
        if not converted:
            raise ValueError(f"LolcatsCache: {type(model).__name__} is not converted")
        super().__init__(config=model.config)
        for i, layer in enumerate(self.layers):
            if slack and type(layer) is DynamicSlidingWindowLayer:
                self.layers[i] = LocalCacheLayer(layer.sliding_window, slack)
        for i in converted:
            self.layers[i] = LolcatsCacheLayer(self.layers[i], slack)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens, from every layer or from none; a positive
        number is the length to crop to.

        Raises:
            ValueError: more than `slack` tokens.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        # States go last: they have the same lengths, so that the first one says if any cannot, and
        # the layers before, which crop by attributes of their own, get these back.
        states = [layer for layer in self.layers if isinstance(layer, LolcatsCacheLayer)]
        others = [layer for layer in self.layers if not isinstance(layer, LolcatsCacheLayer)]
        before = [dict(vars(layer)) for layer in others]
        try:
            for layer in (*others, *states):
                layer.crop(tokens_to_remove)
        except Exception:
            for layer, attributes in zip(others, before, strict=True):
                vars(layer).update(attributes)
            raise


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values and states in a cache of transformers, whatever its layers are.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> keys, values = torch.zeros(2, 1, 4, 10, 16)
    >>> _ = cache.update(keys, values, layer_idx=0)
    >>> cache_bytes(cache)  # two tensors of 640 floats
    5120
    """
    held = (x for layer in cache.layers for x in _pytree.tree_leaves(vars(layer)))
    return sum(x.nbytes for x in held if isinstance(x, Tensor))
