"""LolcatsConfig: what it refuses, and that its settings reach the operators."""

from dataclasses import replace

import pytest
import torch
import transformers
from helpers.tiny_models import NARROW, tiny, token_ids

import lolcats_ops as lo


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("window", -1, ValueError),
        ("window", 1.5, TypeError),
        ("window_kind", "round", ValueError),
        ("activation", "sin", ValueError),
        ("gate_init", float("nan"), ValueError),
        ("feature_dim", 0, ValueError),
        ("softmax_layers", 1, TypeError),
        ("softmax_layers", "01", TypeError),
        ("softmax_layers", (True,), TypeError),
        ("softmax_layers", (1.0,), TypeError),
        ("softmax_layers", (-1,), ValueError),
        ("gate_init", "a", TypeError),
        ("gate_init", True, TypeError),
        ("gate_init", torch.tensor(0.1), TypeError),
        ("affine", "no", TypeError),
        ("two_sided", "no", TypeError),
        ("share_kv_features", 1, TypeError),
    ],
)
def test_config_names_the_bad_field(field, value, error):
    with pytest.raises(error, match=field):
        lo.hf.LolcatsConfig(**{field: value})


def test_one_sided_activations_are_one_sided_whatever_is_asked():
    config = lo.hf.LolcatsConfig(activation="relu")
    assert config == lo.hf.LolcatsConfig(activation="relu", two_sided=False)
    assert lo.hf.LolcatsConfig.from_dict(config.to_dict()) == config


def test_config_round_trips_and_refuses_unknown_keys():
    config = lo.hf.LolcatsConfig(window=32, softmax_layers=[1, 2])
    assert lo.hf.LolcatsConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="windw"):
        lo.hf.LolcatsConfig.from_dict({"windw": 3})


@torch.no_grad()
def test_affine_is_of_the_forward_pass_and_of_a_padded_cache():
    model = lo.hf.convert(tiny(), replace(NARROW, affine=True, gate_init=1.0))
    ids, mask = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :7] = 0
    whole = model(ids, attention_mask=mask).logits
    cache = transformers.DynamicCache(config=model.config)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, 30), (30, 31), (31, 40))
    ]
    torch.testing.assert_close(
        torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4
    )
    plain = lo.hf.convert(tiny(), replace(NARROW, gate_init=1.0))
    assert (plain(ids, attention_mask=mask).logits - whole)[mask.bool()].abs().max() > 1e-3


def test_the_projection_of_favor_is_that_of_its_group():
    config = lo.hf.LolcatsConfig(
        window=8,
        feature_dim=16,
        activation="favor",
        two_sided=False,
        init="orthogonal",
        share_kv_features=True,
    )
    for layer in lo.hf.attention_layers(lo.hf.convert(tiny(), config)):
        group = len(layer.feature_q) // len(layer.feature_k)
        assert group > 1
        assert len(layer.feature_k) > 1
        assert layer.feature_q.equal(layer.feature_k.repeat_interleave(group, 0))
