"""What a cache of states refuses: calls it cannot serve, and to go on once it is half updated."""

import pytest
import torch
import transformers
from helpers.tiny_models import SHAPE, WIDE, token_ids

import lolcats_ops as lo


@torch.no_grad()
def test_a_call_that_is_refused_changes_no_cache(model):
    ids, bounds = token_ids(1, 20), torch.tensor([0, 4, 10], dtype=torch.int32)
    expected = model(ids, use_cache=False).logits[:, 10:]
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6}
    for wrong in ({"output_attentions": True}, {**packed, "max_length_k": 6}):
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :10], past_key_values=cache)
        with pytest.raises(NotImplementedError):
            model(ids[:, 10:], past_key_values=cache, **wrong)
        got = model(ids[:, 10:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_call_that_does_not_fit_the_cache_is_named_and_not_counted(model):
    ids = token_ids(2, 20)
    expected = model(ids[:1], use_cache=False).logits[:, 10:]
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:1, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 1 sequences, this call has 2"):
        model(ids[:, 10:], past_key_values=cache)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"filled in torch\.float32 and is continued in "),
    ):
        model(ids[:1, 10:], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask is of 12 tokens, needs the 10 of earlier"):
        model(ids[:1, 10:], attention_mask=torch.ones(1, 12), past_key_values=cache)
    got = model(ids[:1, 10:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_that_was_interrupted_between_layers_is_refused(model):
    ids, cache = token_ids(1, 20), transformers.DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 10:], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="half updated, its layers hold 10 and 20 tokens"):
        model(ids[:, 10:], past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_which_softmax_layers_alone_were_cropped_is_refused(model):
    lo.hf.restore(model)
    lo.hf.convert(model, lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(0,)))
    ids, cache = token_ids(1, 20), transformers.DynamicCache(config=model.config)
    model(ids[:, :15], past_key_values=cache)
    with pytest.raises(ValueError, match="which reaches tokens already folded"):
        cache.crop(-8)
    with pytest.raises(ValueError, match="half updated, its layers hold 7 and 15 tokens"):
        model(ids[:, 15:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("filled", [True, False])
def test_a_restored_model_is_refused_the_cache_of_a_converted_one(model, filled):
    cache, ids = lo.hf.LolcatsCache(model), token_ids(1, 20)
    if filled:
        model(ids[:, :10], past_key_values=cache)
    lo.hf.restore(model)
    with pytest.raises(ValueError, match="its model has others: start with a fresh one"):
        model(ids[:, 10:], past_key_values=cache)


@torch.no_grad()
def test_a_layer_that_attends_twice_is_refused_a_cache(prompt):
    model = transformers.AutoModelForCausalLM.from_config(transformers.DiffLlamaConfig(**SHAPE))
    expected = model.eval()(prompt).logits
    lo.hf.convert(model, WIDE)
    got = model(prompt, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model(prompt)


def test_paged_cache_is_refused(model):
    with pytest.raises(NotImplementedError, match="paged"):
        model(token_ids(1, 4), cache=object())
