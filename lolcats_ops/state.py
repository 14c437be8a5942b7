"""The recurrent state of an attention (SPEC 5): of constant size, however many tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._codes import WINDOW_KINDS, window_span
from ._sizes import check_size
from .features import Features


def window_start(position: Tensor, window: int, window_kind: str) -> Tensor:
    """e(i), the first position that query i attends by softmax (SPEC 2); 0 for i < 0.

    >>> window_start(torch.arange(6), 2, "sliding").tolist()
    [0, 0, 1, 2, 3, 4]
    >>> window_start(torch.arange(6), 2, "terrace").tolist()
    [0, 0, 0, 0, 2, 2]
    """
    if window_kind == "sliding" or window == 0:
        return (position - window + 1).clamp(min=0)
    return ((position // window - 1) * window).clamp(min=0)


def sequence_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences x [B, ...] holds: B, or the N that cu_seqlens [N + 1] packs in one row."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@dataclass(frozen=True, eq=False)
class HybridState:
    """What an attention remembers of P sequences.

    ``kv``, ``ksum``: sums of phi_k(k_j) (x) v_j and of phi_k(k_j) over the positions [sink,
    folded). ``k_ring``, ``v_ring``: keys and values of the positions [folded, length), each at slot
    position % R; other slots are stale. ``k_sink``, ``v_sink``: positions [0, min(sink, length)).
    The state of linear_attention has window = sink = R = 0.

    >>> state = HybridState.empty(2, 8, 4, 64, 64, 128, window=64, sink=1, slack=8)
    >>> state.k_ring.shape, state.slack, state.length.tolist()
    (torch.Size([2, 4, 72, 64]), 8, [0, 0])
    """

    kv: Tensor  # [P, Hs, F, V], fp32 (fp64 in an fp64 reference)
    ksum: Tensor  # [P, Hs, F]
    k_ring: Tensor  # [P, Hk, R, D]
    v_ring: Tensor  # [P, Hk, R, V]
    k_sink: Tensor  # [P, Hk, s, D]
    v_sink: Tensor  # [P, Hk, s, V]
    length: Tensor  # [P] int64, tokens so far
    folded: Tensor  # [P] int64, leading positions that live in (kv, ksum)
    window: int
    window_kind: str = "sliding"

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        feature_dim: int,
        *,
        window: int,
        window_kind: str = "sliding",
        sink: int = 0,
        slack: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> HybridState:
        """The state of ``batch`` sequences (or slots of a pool) before their first token.

        Args:
            heads: Hs, the heads of feature_k: query heads, or key/value heads where a group shares
                its map.
            feature_dim: F, ``features.out_features``: twice the width f where it is two-sided.
            slack: how many of the last tokens ``rewind`` can always take back.
            dtype: of keys and values; the sums are fp32 (fp64 with fp64 keys).

        Raises:
            TypeError: a size that is no integer.
            ValueError: a negative size, or an unknown ``window_kind``.
        """
        if window_kind not in WINDOW_KINDS:
            raise ValueError(
                f"HybridState.empty: window_kind is {window_kind!r}, needs one of "
                f"{', '.join(WINDOW_KINDS)}"
            )
        sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        sizes |= {"value_dim": value_dim, "feature_dim": feature_dim}
        for name, value in {**sizes, "window": window, "sink": sink, "slack": slack}.items():
            if not isinstance(value, torch.SymInt):
                check_size("HybridState.empty", name, value, 0)
        window, sink, slack = map(index, (window, sink, slack))  # of NumPy they may be of 8 bits
        ring = window_span(window, window_kind) + slack
        sums: dict[str, Any] = {
            "dtype": torch.promote_types(dtype, torch.float32),
            "device": device,
        }
        keys: dict[str, Any] = {"dtype": dtype, "device": device}
        return cls(
            kv=torch.zeros(batch, heads, feature_dim, value_dim, **sums),
            ksum=torch.zeros(batch, heads, feature_dim, **sums),
            k_ring=torch.zeros(batch, kv_heads, ring, head_dim, **keys),
            v_ring=torch.zeros(batch, kv_heads, ring, value_dim, **keys),
            k_sink=torch.zeros(batch, kv_heads, sink, head_dim, **keys),
            v_sink=torch.zeros(batch, kv_heads, sink, value_dim, **keys),
            length=torch.zeros(batch, dtype=torch.int64, device=device),
            folded=torch.zeros(batch, dtype=torch.int64, device=device),
            window=window,
            window_kind=window_kind,
        )

    @classmethod
    def empty_for(
        cls,
        k: Tensor,
        v: Tensor,
        feature_k: Features,
        *,
        batch: int | None = None,
        window: int,
        window_kind: str = "sliding",
        sink: int = 0,
        slack: int = 0,
    ) -> HybridState:
        """``empty`` for keys k [B, Hk, T, D], values v [B, Hk, T, V] and the map of the keys.

        Args:
            batch: where sequences are packed, or states are a pool, how many; None for B.
            slack: how many of the last tokens ``rewind`` can always take back.

        >>> from lolcats_ops.features import init_weight
        >>> k, v = torch.randn(2, 1, 2, 10, 16)
        >>> HybridState.empty_for(k, v, Features(init_weight(2, 16, 16)), window=8).kv.shape
        torch.Size([1, 2, 32, 16])
        """
        return cls.empty(
            k.shape[0] if batch is None else batch,
            feature_k.heads,
            k.shape[1],
            k.shape[3],
            v.shape[3],
            feature_k.out_features,
            window=window,
            window_kind=window_kind,
            sink=sink,
            slack=slack,
            dtype=k.dtype,
            device=k.device,
        )

    @classmethod
    def of_sums(
        cls,
        kv: Tensor,
        ksum: Tensor,
        length: Tensor,
        *,
        head_dim: int,
        kv_heads: int,
        dtype: torch.dtype | None = None,
    ) -> HybridState:
        """The state of linear_attention after ``length`` tokens, all of which are in (kv, ksum);
        dtype: of the keys and values that went into it, None for kv's."""
        keys = kv.new_empty(kv.shape[0], kv_heads, 0, head_dim, dtype=dtype)
        values = kv.new_empty(kv.shape[0], kv_heads, 0, kv.shape[3], dtype=dtype)
        return cls(kv, ksum, keys, values, keys.clone(), values.clone(), length, length.clone(), 0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of the operator's schema."""
        return {name: getattr(self, name) for name in STATE_TENSORS}

    @property
    def batch(self) -> int:
        """P, the number of sequences or slots."""
        return self.length.shape[0]

    @property
    def ring(self) -> int:
        """R, the slots of the ring."""
        return self.k_ring.shape[2]

    @property
    def sink(self) -> int:
        """s, the first tokens that every query attends by softmax."""
        return self.k_sink.shape[2]

    @property
    def slack(self) -> int:
        """How many of the last tokens ``rewind`` can always take back."""
        return self.ring - window_span(self.window, self.window_kind)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def rewind(self, n: int | Tensor) -> HybridState:
        """Takes back the last ``n`` tokens (or ``n[p]`` of sequence p, n of shape [P] or []) in
        place, returns self.

        Always possible for n <= slack since the longest length so far, and for any n while nothing
        has been folded.

        Raises:
            TypeError: n is no integer, nor a tensor of them.
            ValueError: n < 0, n > length, or tokens of the remaining window have already left the
                ring; a tensor of another shape than [P].

        >>> HybridState.empty(1, 1, 1, 4, 4, 8, window=4, slack=2).rewind(1)
        Traceback (most recent call last):
        ...
        ValueError: HybridState.rewind: n is 1, needs 0 <= n <= length, which is [0]
        """
        if isinstance(n, Tensor):
            if n.dtype == torch.bool or n.is_floating_point() or n.is_complex():
                raise TypeError(f"HybridState.rewind: n is {n.dtype}, needs integers")
            if n.shape not in ((), self.length.shape):
                raise ValueError(
                    f"HybridState.rewind: n has shape {list(n.shape)}, needs [{self.batch}]"
                )
        elif isinstance(n, bool) or not isinstance(n, Integral):
            raise TypeError(f"HybridState.rewind: n is {n!r}, needs an integer or a tensor of them")
        length = self.length - n
        if bool(((length < 0) | (length > self.length)).any()):
            raise ValueError(
                f"HybridState.rewind: n is {n}, needs 0 <= n <= length, which is "
                f"{self.length.tolist()}"
            )
        # The next query has position `length`: neither its window nor a kept token may be folded.
        oldest = torch.minimum(window_start(length, self.window, self.window_kind), length)
        if bool((self.folded > oldest).any()):
            raise ValueError(
                f"HybridState.rewind: n is {n}, which reaches tokens already folded into kv, "
                f"needs at most what is left of the slack of {self.slack}"
            )
        with self._changeable():
            self.length.copy_(length)
        return self

    def select(self, indices: Tensor) -> HybridState:
        """A copy of the sequences ``indices`` [n], repeated or not: beam search, prompt caching.

        Raises:
            TypeError: indices that are no tensor of int32 or int64, such as a mask.
        """
        _check_indices("select", indices)
        return self._map(lambda x: x.index_select(0, indices))

    def clone(self) -> HybridState:
        """A copy that shares no memory, and is contiguous."""
        return self._map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def to(self, device: torch.device | str | int) -> HybridState:
        """The state on ``device``; its dtypes, which mean something each, stay.

        Raises:
            TypeError: a dtype, or another tensor, in the place of a device.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"HybridState.to: got {type(device).__name__}, needs a device")
        return self._map(lambda x: x.to(device))

    def _map(self, f: Callable[[Tensor], Tensor]) -> HybridState:
        tensors = {name: f(x) for name, x in self.tensors.items()}
        return HybridState(**tensors, window=self.window, window_kind=self.window_kind)

    def reset(self, indices: Tensor | None = None) -> HybridState:
        """Empties all sequences, or the slots ``indices`` [n], in place and returns self.

        Raises:
            TypeError: indices that are no tensor of int32 or int64, such as a mask.
            IndexError: slots that do not exist; nothing has changed then.
        """
        if indices is not None:
            _check_indices("reset", indices)
            self.length.index_select(0, indices)  # before anything changes: whether slots exist
        # Keys need no clearing: length and folded say which slots are live.
        with self._changeable():
            for t in (self.kv, self.ksum, self.length, self.folded):
                t.zero_() if indices is None else t.index_fill_(0, indices.long(), 0)
        return self

    def _changeable(self) -> AbstractContextManager[Any]:
        """Where tensors may change: those that were made in inference mode may only there."""
        return torch.inference_mode() if self.length.is_inference() else nullcontext()


def _check_indices(method: str, indices: Tensor) -> None:
    got = indices.dtype if isinstance(indices, Tensor) else f"a {type(indices).__name__}"
    if got not in (torch.int32, torch.int64):
        raise TypeError(f"HybridState.{method}: indices is {got}, needs a tensor of int32 or int64")


def is_readable(x: Tensor) -> bool:
    """Whether reading a value is free: a real tensor on the CPU, outside of any tracing."""
    return (
        not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None  # such as that of fake tensors
        and x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


STATE_TENSORS = tuple(f.name for f in fields(HybridState) if not f.name.startswith("window"))


def _flatten(state: HybridState) -> tuple[list[Tensor], tuple[int, str]]:
    return list(state.tensors.values()), (state.window, state.window_kind)


# torch.export takes states in and out.
_pytree.register_pytree_node(
    HybridState,
    _flatten,
    lambda tensors, windows: HybridState(*tensors, *windows),
    serialized_type_name="lolcats_ops.HybridState",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda state: (
        [(_pytree.GetAttrKey(name), tensor) for name, tensor in state.tensors.items()],
        (state.window, state.window_kind),
    ),
)
torch.serialization.add_safe_globals([HybridState])  # torch.load, which loads weights alone, may
