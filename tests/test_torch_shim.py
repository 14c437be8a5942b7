"""torch.ops.lolcats_ops as C++ registers it: schemas, memory order, ownership, errors."""

import re

import pytest
import torch

from lolcats_ops import _C
from lolcats_ops.ops.registration import NAMESPACES

raw = torch.ops.lolcats_ops

OPERATORS = [name for name in dir(_C) if "->" in (getattr(_C, name).__doc__ or "").splitlines()[-1]]
SOFTMAX = (0, True, False, 1e-12)
B, H, KV_HEADS, T, D, V, F = 2, 4, 2, 5, 8, 6, 3


def hybrid_arguments(**change):
    arguments = {
        "q": torch.randn(B, H, T, D),
        "k": torch.randn(B, KV_HEADS, T, D),
        "v": torch.randn(B, KV_HEADS, T, V),
        "weight_q": torch.randn(H, D, F),
        "bias_q": torch.randn(H, F),
        "weight_k": torch.randn(KV_HEADS, D, F),
        "bias_k": torch.randn(KV_HEADS, F),
        "gate": torch.zeros(H),
        "cu_seqlens": None,
        "key_padding_mask": torch.ones(B, T, dtype=torch.bool),
    }
    return {**arguments, **change}


def hybrid(arguments):
    return raw.hybrid_attention(*arguments.values(), 2, 0, 1, D**-0.5, False, *SOFTMAX)


def test_numpy_and_torch_have_the_same_operators_with_the_same_schemas():
    assert len(OPERATORS) == 9
    for name in OPERATORS:
        schema = str(getattr(raw, name).default._schema).removeprefix(f"lolcats_ops::{name}")
        documented = getattr(_C, name).__doc__.splitlines()[-1]
        assert re.sub(r"\s", "", schema) == re.sub(r"\s", "", documented)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_namespace_has_the_operators_for_cuda_tensors(namespace):
    for name in OPERATORS:
        op = getattr(getattr(torch.ops, namespace), name).default
        schemas = (str(o._schema).partition("(")[2] for o in (op, getattr(raw, name).default))
        assert len(set(schemas)) == 1
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CUDA")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_output_has_the_memory_order_of_q(order):
    q = torch.randn(*([B, H, T, D][axis] for axis in order)).permute(order)
    out, m, den = hybrid(hybrid_arguments(q=q))
    assert out.shape == (B, H, T, V)
    assert out.permute(order).is_contiguous()
    assert m.is_contiguous()
    assert den.is_contiguous()


def test_absent_gradients_are_empty_tensors():
    x, weight = torch.randn(B, H, T, D), torch.randn(H, D, F)
    dy = torch.randn(B, H, T, 2 * F)
    *_, dbias = raw.feature_map_backward(dy, x, weight, None, *SOFTMAX)
    assert dbias.shape == (0,)


@pytest.mark.parametrize("change", [{}, {"gate": torch.zeros(H + 1)}])
def test_arguments_are_released_after_success_and_failure(change):
    arguments = hybrid_arguments(**change)
    tensors = [t for t in arguments.values() if t is not None]
    before = [t._use_count() for t in tensors]
    try:
        hybrid(arguments)
    except RuntimeError:
        assert change
    assert [t._use_count() for t in tensors] == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": torch.zeros(H + 1)}, "gate"),
        ({"q": torch.randn(B, H, T, D, dtype=torch.float64)}, "q"),
        ({"q": torch.randn(1, B, H, T, D)}, "q has 5 dimensions"),
        ({"key_padding_mask": torch.ones(B, T)}, "key_padding_mask"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(RuntimeError, match=words):
        hybrid(hybrid_arguments(**change))


@pytest.mark.parametrize("which", ["q", "k"])
def test_a_bias_without_a_weight_is_refused(which):
    x, bias = torch.rand(B, H, T, D), torch.randn(H, D)
    maps = [None, bias, None, None] if which == "q" else [None, None, None, bias]
    rest = (None, None, None, None, 1.0, True, 0.0, *SOFTMAX)
    with pytest.raises(RuntimeError, match=f"feature_{which}.bias is given without a weight"):
        raw.linear_attention(x, x, x, *maps, *rest)


def test_a_result_that_memory_cannot_hold_is_refused_in_torchs_words():
    x = torch.zeros(1, 1, 1, 64).expand(1, 1, 2**42, 64)
    with pytest.raises(RuntimeError, match="allocate" if torch.__version__ >= "2.13" else "failed"):
        raw.feature_map(x, torch.zeros(1, 64, 64), None, *SOFTMAX)
