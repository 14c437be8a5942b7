"""The attention of a converted layer: its parameters, and what transformers dispatches to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

import lolcats_ops as lo
from lolcats_ops.features import init_weight
from lolcats_ops.hf.config import LolcatsConfig
from lolcats_ops.nn import Fp32Module
from lolcats_ops.ops.registration import autocast

if TYPE_CHECKING:
    from lolcats_ops.reference import Transfer

NAME = "lolcats"
MASK_ROWS = 512  # that are compared at a time: a fraction of the memory of the mask itself
# What transformers' attentions may be asked for beside the scores of queries and keys.
REFUSED = (
    *("dropout", "softcap", "output_attentions", "position_bias"),
    *("block_indices", "indices", "s_aux", "sinks"),
)
BLOCKED = -1e3  # at most, in an additive mask: exp of it is 0 in fp64 as well
Mode = Literal["hybrid", "transfer", "softmax"]


class Attend(Protocol):
    """`lo.attention_transfer` on some rows of a batch."""

    def __call__(self, rows: slice, *, xent: bool = False) -> Transfer: ...


Learner = Callable[[Attend, int], Tensor]


class LolcatsAttention(Fp32Module):
    """What a converted layer adds to its attention module, as the submodule `lolcats`.

    Parameters are fp32 and stay fp32 whatever the model is cast to: in bf16 at a learning rate of
    1e-3 a gate does not move at all.

    Attributes:
        feature_q: [H, D, f], the query map of each head.
        feature_k: [H, D, f], or [Hk, D, f] with `share_kv_features`. Those of favor are buffers:
            nothing trains them.
        gate: [H], before the sigmoid.
        mode: "hybrid" (the linearized model), "transfer" (stage 1: the teacher's output flows on
            and `learner` is called), "softmax" (the original model). Set by `lo.hf.set_mode`.
        learner: called in transfer mode with (attend, batch): `attend(rows, xent=False)` computes
            `lo.attention_transfer` on those rows of the batch. It returns the
            teacher's output [B, H, T, V].
        backend: `backend=` of the operators; None takes the best of the device.
    """

    feature_q: Tensor
    feature_k: Tensor

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, config: LolcatsConfig, device: torch.device
    ):
        super().__init__()
        self.config = config
        self.mode: Mode = "hybrid"
        self.learner: Learner | None = None
        self.backend: str | None = None

        def fp32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        key_maps = kv_heads if config.share_kv_features else heads
        for name, maps in (("feature_q", heads), ("feature_k", key_maps)):
            weight = fp32(maps, head_dim, config.feature_dim)
            if config.activation == "favor":
                self.register_buffer(name, weight)
            else:
                self.register_parameter(name, nn.Parameter(weight))
        self.gate = nn.Parameter(fp32(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values of the parameters that no checkpoint has given theirs."""

        def is_given(x: Tensor) -> bool:
            return x.is_meta or getattr(x, "_is_hf_initialized", False)  # transformers' mark

        if not is_given(self.gate):
            self.gate.fill_(self.config.gate_init)
        for x in (self.feature_q, self.feature_k):
            if not is_given(x):
                maps, head_dim, width = x.shape
                x.copy_(init_weight(maps, head_dim, width, self.config.init, device=x.device))
        if self.config.activation == "favor" and not is_given(self.feature_q):
            group = len(self.feature_q) // len(self.feature_k)
            self.feature_q.copy_(self.feature_k.repeat_interleave(group, 0))

    def features(self) -> tuple[lo.Features, lo.Features]:
        """The feature maps of queries and keys."""
        kind = self.config.kind
        return lo.Features(self.feature_q, **kind), lo.Features(self.feature_k, **kind)

    def empty_state(self, key: Tensor, value: Tensor, slack: int) -> lo.HybridState:
        """The state before the first token, for keys [B, Hk, T, D] and values [B, Hk, T, V]."""
        windows = self.config.windows
        return lo.HybridState.empty_for(key, value, self.features()[1], **windows, slack=slack)

    def refuse(self, asked: Mapping[str, Any]) -> None:
        """Raises NotImplementedError for what this attention does not have."""
        for name in REFUSED:
            value = asked.get(name)
            if isinstance(value, Tensor):
                raise NotImplementedError(f"lolcats attention has no {name}")
            if value:
                raise NotImplementedError(f"lolcats attention has no {name} (got {value})")
        if asked.get("is_causal") is False:
            raise NotImplementedError("lolcats attention is causal (got is_causal=False)")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        lolcats_cache: Any = None,
        lolcats_cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """From [B, H, T, D] and [B, Hk, T, D|V] to [B, T, H, V].

        `key` and `value` are those of the T new tokens alone: what came before is in
        `lolcats_cache`, a `LolcatsCacheLayer`. `lolcats_cu_seqlens` are the bounds of packed
        sequences in the flattened batch.

        Raises:
            NotImplementedError: attention dropout, soft capping or weights to return, which this
                attention does not have; packed sequences that are to be cached.
        """
        self.refuse({"dropout": dropout, **kwargs})
        query, key, value = autocast(query, key, value)
        batch, _, tokens, _ = query.shape
        config, (feature_q, feature_k) = self.config, self.features()
        options: dict[str, Any] = {
            "scale": scaling,
            "affine": config.affine,
            "backend": self.backend,
        }
        trains = torch.is_grad_enabled() and any(
            x.requires_grad for x in (query, key, value, *self.parameters())
        )
        if lolcats_cache is not None and trains:
            lolcats_cache.leave_out(tokens)
        elif lolcats_cache is not None:
            if lolcats_cu_seqlens is not None:
                raise packed_in_cache()
            real = real_tokens(attention_mask, batch, tokens, lolcats_cache.cumulative_length)
            out = lolcats_cache.attend(self, query, key, value, real, **options)
            return out.transpose(1, 2).contiguous()

        options |= config.windows
        padding = None
        if lolcats_cu_seqlens is None:
            padding = real_tokens(attention_mask, batch, tokens)
        else:
            query, key, value = (
                x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key, value)
            )

        if self.mode == "transfer":
            if self.learner is None:
                raise RuntimeError(
                    "transfer mode needs a learner: see lolcats_ops.convert.transfer"
                )

            def attend(rows: slice, *, xent: bool = False) -> Transfer:
                return lo.attention_transfer(
                    query[rows].detach(),
                    key[rows].detach(),
                    value[rows].detach(),
                    feature_q,
                    feature_k,
                    self.gate,
                    xent=xent,
                    cu_seqlens=lolcats_cu_seqlens,
                    key_padding_mask=None if padding is None else padding[rows],
                    **options,
                )

            out = self.learner(attend, query.shape[0])
        else:
            out = lo.hybrid_attention(
                query,
                key,
                value,
                feature_q,
                feature_k,
                self.gate,
                cu_seqlens=lolcats_cu_seqlens,
                key_padding_mask=padding,
                **options,
            )
        return out.transpose(1, 2).reshape(batch, tokens, *out.shape[1::2]).contiguous()

    def extra_repr(self) -> str:
        heads, head_dim, width = self.feature_q.shape
        window = self.config.window
        return f"{self.mode}, {heads=}, {head_dim=}, feature_dim={width}, {window=}"


def lolcats_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' attention interface; called as a module, so that hooks which bring parameters
    to their device (accelerate) see it."""
    return module.lolcats(*args, **kwargs), None  # type: ignore[operator]


def attention_of(module: nn.Module) -> LolcatsAttention | None:
    """What `convert` gave an attention module; of copies that PEFT trains, the active one."""
    found: Any = module._modules.get("lolcats")
    if copies := getattr(found, "modules_to_save", None):
        active = [] if found.disable_adapters else [n for n in found.active_adapters if n in copies]
        found = copies[active[0]] if active else found.original_module
    return found if isinstance(found, LolcatsAttention) else None


def real_tokens(mask: Tensor | None, batch: int, tokens: int, past: int = 0) -> Tensor | None:
    """[B, T] bool, True = real, of the T new tokens, from whichever causal mask transformers built.

    A token attends itself exactly if it is real, so the answer is on the diagonal of a [B, 1, T,
    Tk] mask (boolean, or additive with 0 for "attend"); a [B, Tk] mask says it directly. Masks are
    of the new tokens, of all up to them, or of all that a static cache has room for.
    """
    if mask is None:
        return None
    first = min(past, mask.shape[-1] - tokens)
    columns = mask[..., first : first + tokens]
    of_queries = mask.dim() == 4
    real = _attended(columns[:, 0].diagonal(dim1=1, dim2=2)) if of_queries else columns.bool()
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not traced and bool(real.all()):
        return None
    return real.expand(batch, tokens).contiguous()


def check_mask(
    mask: Tensor,
    past: int,
    sliding_window: int | None,
    starts: Tensor | None = None,
    held: Tensor | None = None,
) -> None:
    """Refuses a [B, H | 1, T, Tk] mask that is not causality (within a sliding window, which the
    model's own attention may have; with ``starts`` [B, T] and nothing past, within the packed
    sequences that start where it is True) and padding: this attention reads no other.

    Raises:
        NotImplementedError: naming what it may be.
        ValueError: of the tokens of earlier calls it shows others than ``held`` [B] real ones, as
            far as their number tells.
    """
    tokens = mask.shape[2]
    first = min(past, mask.shape[3] - tokens)
    new = slice(first, first + tokens)
    real = _attended(mask[:, :, :, new].diagonal(dim1=2, dim2=3))  # [B, H, T]
    key = torch.arange(mask.shape[3], device=mask.device)
    sequence = None if starts is None else starts.to(mask.device).cumsum(1)
    # A mask of the new tokens alone, or of a sliding window, leaves out others of the past.
    if first < past or (sliding_window and sliding_window < past + tokens):
        held = None
    refused = bool((real != real[:, :1]).any())
    for start in range(0, tokens, MASK_ROWS):
        rows = slice(start, start + MASK_ROWS)
        _check_values(mask[:, :, rows])
        attended, asks = _attended(mask[:, :, rows]), real[:, :, rows, None]
        if held is not None:
            shown = attended[..., :past].sum(-1, keepdim=True)
            if bool(((shown != held.to(mask.device)[:, None, None, None]) & asks).any()):
                raise past_differs(held)
        query = torch.arange(first, first + tokens, device=mask.device)[rows, None]
        allowed = (key <= query).repeat(*real.shape[:2], 1, 1)
        if sequence is not None:
            same = sequence[:, None, rows, None] == sequence[:, None, None, :]
            allowed = allowed & nn.functional.pad(same, (0, len(key) - tokens))
        allowed[..., new] &= real[:, :, None]
        needed = allowed
        if first:  # of the keys of earlier calls, the mask alone says which are padding
            needed = needed & (key >= first)
        if sliding_window:
            needed = needed & (key > query - sliding_window)
        wrong = (needed > attended) | (attended > allowed)
        refused = refused or bool((wrong & asks).any())
    if refused:
        raise NotImplementedError(
            "lolcats attention is causal and has padding; this attention_mask asks for more. "
            "Pack sequences by position_ids that restart, without a mask"
        )


def packed_in_cache() -> NotImplementedError:
    """The refusal of packed sequences beside a cache."""
    return NotImplementedError(
        "packed sequences (cu_seq_lens_q) do not go into a cache: pass use_cache=False"
    )


def past_differs(held: Tensor) -> ValueError:
    """The refusal of a mask that shows another number of past tokens than the ``held`` [B]."""
    return ValueError(
        "attention_mask shows another number of tokens of earlier calls than were real in them, "
        f"{held.tolist()}: a recurrent state cannot hide what it holds, nor show padding, which it "
        "does not hold"
    )


def _check_values(mask: Tensor) -> None:
    """Refuses numbers that are neither "attend" nor "blocked"."""
    if mask.dtype == torch.bool:
        return
    if not mask.is_floating_point() or bool(((mask != 0) & ~(mask <= BLOCKED)).any()):
        raise NotImplementedError(
            f"attention_mask of {mask.dtype} has other values than lolcats attention reads: bool, "
            f"True to attend, or floats to add, 0 to attend and at most {BLOCKED:g} to block"
        )


def _attended(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def packed_starts(
    position_ids: Tensor, mask: Tensor | None, batch: int | None = None
) -> Tensor | None:
    """Where packed sequences start, [B, T] bool, or None if nothing is packed; ``batch`` is B, None
    for that of the arguments.

    Positions that restart, or jump, mean packing where transformers takes them so: where the mask
    that it made is block-diagonal. Beside a padding mask it makes a causal one.
    """
    if mask is None or mask.dim() != 4 or torch.compiler.is_exporting():
        return None
    if position_ids.dim() == 3:  # of time, height and width; before them those in the text, or not
        if len(position_ids) < 4:
            return None
        position_ids = position_ids[0]
    batch = max(len(position_ids), len(mask)) if batch is None else batch
    position_ids = position_ids.expand(batch, -1)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    row, i = starts[:, 1:].to(mask.device).nonzero(as_tuple=True)
    rows = mask[:, 0].expand(batch, -1, -1)
    if not len(i) or bool(_attended(rows[row, i + 1, i]).any()):
        return None
    return None if real_tokens(mask, batch, position_ids.shape[1]) is not None else starts


def bounds_of(starts: Tensor) -> Tensor:
    """cu_seqlens in the flattened batch of the sequences that start where ``starts`` is True."""
    bounds = starts.flatten().nonzero().flatten()
    return torch.cat((bounds, bounds.new_tensor([starts.numel()]))).int()
