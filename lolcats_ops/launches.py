"""What the CUDA kernels would launch for a case: asked of the C library, whose plans decide it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from . import _C
from ._codes import ACTIVATIONS, DTYPES, TWO_SIDED, WINDOW_KINDS, window_span
from .case import Case
from .features import out_features

MOST_SHARED_BYTES = 227 * 1024  # of a block, on the GPU that has most: sm_90 and sm_100
_EPS = 1e-12
_LONGEST = 2**40  # longer ones, whose bytes are no int64, are planned or refused alike
_F32, _I64, _BOOL = (DTYPES.index(name) for name in ("float32", "int64", "bool"))


class Launches(NamedTuple):
    """What the kernels of a case need, or why they cannot run it."""

    refusal: str | None
    kernels: tuple[str, ...] = ()  # names in C++
    shared_bytes: int = 0  # the most that a block takes; of a step, enough


@lru_cache(maxsize=1024)
def launches_of(case: Case, most_shared_bytes: int = MOST_SHARED_BYTES) -> Launches:
    """What runs a case where a block may have so much shared memory. Needs neither a GPU nor a
    build with the kernels."""
    longest = {name: min(getattr(case, name), _LONGEST) for name in ("tokens", "window", "sink")}
    arguments = _ARGUMENTS[case.op](replace(case, **longest))
    try:
        launches = _C.cuda_launches(case.op, most_shared_bytes, *arguments)
    except ValueError as error:  # "hybrid_attention_step: key_padding_mask is not for ..."
        return Launches(str(error).partition(": ")[2])
    kernels = tuple(kernel for kernel, *_ in launches)
    return Launches(None, kernels, max((shared for *_, shared in launches), default=0))


# Arguments in the order of the schemas, of one sequence and head; tensors are (dtype, shape).


def _rows(case: Case, width: int) -> tuple[int, tuple[int, ...]]:
    return DTYPES.index(str(case.dtype).removeprefix("torch.")), (1, 1, case.tokens, width)


def _qkv(case: Case) -> tuple[Any, ...]:
    q = _rows(case, case.head_dim)
    return q, q, _rows(case, case.value_dim)


def _map(case: Case) -> tuple[Any, ...]:
    """Weight and bias."""
    return (_F32, (1, case.head_dim, case.feature_dim)) if case.feature_dim else None, None


def _codes(case: Case) -> tuple[Any, ...]:
    if not case.feature_dim:
        return ACTIVATIONS.index("identity"), False, False, _EPS
    two_sided = case.two_sided and case.activation in TWO_SIDED
    return ACTIVATIONS.index(case.activation), two_sided, False, _EPS


def _sequences(case: Case) -> tuple[Any, ...]:
    """cu_seqlens and key_padding_mask."""
    return None, (_BOOL, (1, case.tokens)) if case.key_padding_mask else None


def _feature_map(case: Case) -> tuple[Any, ...]:
    return _rows(case, case.head_dim), *_map(case), *_codes(case)


def _linear_attention(case: Case) -> tuple[Any, ...]:
    inputs = (*_qkv(case), *_map(case), *_map(case), None, None, *_sequences(case))
    return *inputs, 1.0, True, _EPS, *_codes(case)


def _student(case: Case) -> tuple[Any, ...]:
    return *_qkv(case), *_map(case), *_map(case), (_F32, (1,))


def _window(case: Case) -> tuple[int, int]:
    return case.window, WINDOW_KINDS.index(case.window_kind)


def _settings(case: Case) -> tuple[Any, ...]:
    return *_window(case), case.sink, 1.0, False, *_codes(case)


def _hybrid_attention(case: Case) -> tuple[Any, ...]:
    return *_student(case), *_sequences(case), *_settings(case)


def _attention_transfer(case: Case) -> tuple[Any, ...]:
    return *_student(case), *_sequences(case), False, *_settings(case)


def _hybrid_attention_step(case: Case) -> tuple[Any, ...]:
    dtype, D, V = _rows(case, 1)[0], case.head_dim, case.value_dim
    F = out_features(case.feature_dim, case.activation, case.two_sided)
    ring = window_span(case.window, case.window_kind)
    state = (
        *((_F32, (1, 1, F, V)), (_F32, (1, 1, F))),
        *((dtype, (1, 1, n, width)) for n in (ring, case.sink) for width in (D, V)),
        *((_I64, (1,)), (_I64, (1,))),
    )
    settings = (*_window(case), 1.0, False, *_codes(case))
    # Two query heads on one state: what they need is enough for one query as well.
    (q, (_, _, *rows)), *others, _ = _student(case)
    student = ((q, (1, 2, *rows)), *others, (_F32, (2,)))
    return *student, *state, None, *_sequences(case), *settings


_ARGUMENTS = {
    "feature_map": _feature_map,
    "linear_attention": _linear_attention,
    "hybrid_attention": _hybrid_attention,
    "hybrid_attention_step_": _hybrid_attention_step,
    "attention_transfer": _attention_transfer,
}
