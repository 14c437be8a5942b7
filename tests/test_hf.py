"""Conversion of Hugging Face models: tiny random models, compared with themselves."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import accelerate
import peft
import pytest
import torch
import transformers

import lolcats_ops as lo

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # large enough that greedy choices are no ties
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "smollm3": transformers.SmolLM3Config,
    "olmo2": transformers.Olmo2Config,
    "granite": transformers.GraniteConfig,
    "mixtral": transformers.MixtralConfig,
}
NARROW = lo.hf.LolcatsConfig(window=8, sink=1, feature_dim=16)
WIDE = lo.hf.LolcatsConfig(window=64, feature_dim=16)


def tiny(family="llama", **changes):
    torch.manual_seed(0)
    config = FAMILIES[family](**SHAPE, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def token_ids(*shape, seed=0):
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, tokens=64, **options):
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=tokens, do_sample=False, **options)


@pytest.fixture
def prompt():
    return token_ids(2, 12)


@pytest.fixture
def model():
    return lo.hf.convert(tiny(), NARROW)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_window_of_all_tokens_is_softmax_in_every_family(family):
    model, ids = tiny(family), token_ids(2, 40)
    expected = model(ids).logits
    lo.hf.convert(model, WIDE)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_cached_generation_equals_uncached_with_left_padding(family, prompt):
    model = lo.hf.convert(tiny(family), NARROW)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    cached = generate(model, prompt, attention_mask=mask)
    assert torch.equal(cached, generate(model, prompt, attention_mask=mask, use_cache=False))
    alone = generate(model, prompt[:1, 5:])
    assert torch.equal(cached[0, 12:], alone[0, 7:])


@pytest.mark.parametrize("window_kind", ["sliding", "terrace"])
@pytest.mark.parametrize("share", [False, True])
def test_cached_generation_equals_uncached_for_every_state_layout(window_kind, share, prompt):
    config = lo.hf.LolcatsConfig(
        window=8, window_kind=window_kind, sink=2, feature_dim=16, share_kv_features=share
    )
    model = lo.hf.convert(tiny(), config)
    assert torch.equal(generate(model, prompt), generate(model, prompt, use_cache=False))


def test_beam_search_reorders_the_state(model, prompt):
    cached = generate(model, prompt, 32, num_beams=3)
    assert torch.equal(cached, generate(model, prompt, 32, num_beams=3, use_cache=False))


def test_generation_from_static_cache_equals_dynamic(model, prompt):
    static = generate(model, prompt, 32, cache_implementation="static")
    assert torch.equal(static, generate(model, prompt, 32))


def test_speculated_tokens_are_taken_back(model, prompt):
    cache = lo.hf.LolcatsCache(model, slack=8)
    options = {"past_key_values": cache, "prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(model, prompt[:1], **options), generate(model, prompt[:1]))


@torch.no_grad()
def test_prompt_in_chunks_equals_prompt_at_once(model):
    ids = token_ids(2, 40)
    cache, pieces = transformers.DynamicCache(config=model.config), []
    for piece in ids.split((10, 1, 19, 10), dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_branches_of_a_copied_cache_are_independent(model):
    ids, cache = token_ids(1, 20), transformers.DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    branch = copy.deepcopy(cache)
    model(token_ids(1, 10, seed=1), past_key_values=branch)
    continued = model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(continued, model(ids).logits[:, 10:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cache_repeats_selects_and_crops(model):
    ids, cache = token_ids(2, 40), lo.hf.LolcatsCache(model, slack=6)
    expected = model(ids).logits[:, 36:]
    model(ids, past_key_values=cache)
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    again = model(ids[:, 36:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="slack"):
        cache.crop(-20)
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_padding_is_not_taken_back_from_a_state(model):
    ids, mask = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 36:38] = 0  # of the last six tokens
    cache = lo.hf.LolcatsCache(model, slack=8)
    for piece in (slice(0, 30), slice(30, 37), slice(37, 40)):
        model(ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=cache)
    cache.crop(-6)
    cache.batch_select_indices(torch.tensor([1, 0]))
    rest = token_ids(2, 6, seed=1)
    mask = torch.ones(2, 40, dtype=torch.long)
    got = model(rest.flip(0), attention_mask=mask, past_key_values=cache).logits.flip(0)
    expected = model(torch.cat((ids[:, :34], rest), 1)).logits[:, 34:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    model(token_ids(2, 9), attention_mask=torch.ones(2, 49).index_fill_(1, torch.tensor([48]), 0),
          past_key_values=cache)  # fmt: skip
    with pytest.raises(ValueError, match="padded batch"):
        cache.crop(-30)


@torch.no_grad()
def test_a_plain_cache_takes_back_what_no_state_has_absorbed(model):
    ids, cache = token_ids(1, 9), transformers.DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    cache.crop(-2)
    got = model(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits[:, 3:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("softmax_layer", [0, 1])
def test_a_cache_may_be_given_by_position(softmax_layer):
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(softmax_layer,))
    model, ids = lo.hf.convert(tiny(), config).model, token_ids(1, 20)
    cache = transformers.DynamicCache()
    for piece in ids.split((12, 8), dim=1):
        got = model(piece, None, None, cache).last_hidden_state
    expected = model(ids).last_hidden_state[:, 12:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_refused_crop_changes_no_layer():
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(0,))
    model, ids = lo.hf.convert(tiny(), config), token_ids(1, 20)
    cache = lo.hf.LolcatsCache(model, slack=2)
    model(ids[:, :16], past_key_values=cache)
    with pytest.raises(ValueError, match="slack"):
        cache.crop(-5)
    got = model(ids[:, 16:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits[:, 16:], rtol=1e-4, atol=1e-4)


def test_a_cache_without_slack_says_which_one_has_some(model, prompt):
    with pytest.raises(ValueError, match=r"lo.hf.LolcatsCache\(model, slack="):
        generate(model, prompt[:1], prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_states_are_freed_without_the_garbage_collector(model):
    cache = transformers.DynamicCache(config=model.config)
    model(token_ids(1, 8), past_key_values=cache)
    model(token_ids(1, 1), past_key_values=cache)
    kept = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert kept() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_cache_serves_one_mode(model):
    ids, cache = token_ids(1, 20), transformers.DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    with lo.hf.use_mode(model, "softmax"), pytest.raises(ValueError, match="start with a fresh"):
        model(ids[:, 10:], past_key_values=cache)
    empty = lo.hf.LolcatsCache(model, slack=4)
    with lo.hf.use_mode(model, "softmax"):
        expected = model(ids).logits[:, 10:]
        model(ids[:, :10], past_key_values=empty)
        got = model(ids[:, 10:], past_key_values=empty).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_cached_under_autocast(model, prompt):
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = model(prompt, attention_mask=mask)
        again = model(prompt[:, :1], past_key_values=got.past_key_values).logits
        expected = model(prompt, attention_mask=mask, use_cache=False).logits
    assert again.isfinite().all()
    torch.testing.assert_close(got.logits[0, 5:], expected[0, 5:], rtol=0.05, atol=0.1)


@torch.no_grad()
def test_cache_size_does_not_grow(model):
    sizes = []
    for tokens in (20, 200):
        cache = transformers.DynamicCache(config=model.config)
        model(token_ids(1, tokens), past_key_values=cache)
        sizes.append(lo.hf.cache_bytes(cache))
    assert sizes[0] == sizes[1] > 0


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model):
    ids = token_ids(2, 40)
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None].expand(2, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = [model(piece, use_cache=False).logits for piece in ids.split((15, 25), dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


def test_packed_documents_may_come_with_their_bounds(model):
    ids = token_ids(1, 40)
    bounds = torch.tensor([0, 15, 40], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    given |= {"max_length_q": 25, "max_length_k": 25}
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    apart = [model(piece, use_cache=False).logits for piece in ids.split((15, 25), dim=1)]
    packed = model(ids, position_ids=positions, **given).logits  # trains: the cache is left out
    torch.testing.assert_close(packed, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="use_cache=False"):
        model(ids, position_ids=positions, **given)


def test_packed_documents_under_their_own_mask_do_not_go_into_a_cache(model):
    positions = torch.cat((torch.arange(6), torch.arange(10)))[None]
    packed = torch.ones(16, 16).tril().bool()[None, None].clone()
    packed[:, :, 6:, :6] = False
    inputs = {"position_ids": positions, "attention_mask": packed}
    expected = model(token_ids(1, 16), **inputs, use_cache=False).logits
    torch.testing.assert_close(model(token_ids(1, 16), **inputs).logits, expected)  # trains
    with torch.no_grad(), pytest.raises(NotImplementedError, match="use_cache=False"):
        model(token_ids(1, 16), **inputs)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("second", [0, 20])
def test_positions_that_jump_beside_a_padding_mask_are_no_packing(implementation, second, prompt):
    model = tiny()
    model.set_attn_implementation(implementation)
    positions = torch.cat((torch.arange(5), second + torch.arange(7)))[None].expand(2, -1)
    inputs = {"position_ids": positions, "attention_mask": torch.ones_like(prompt)}
    expected = model(prompt, **inputs).logits
    lo.hf.convert(model, WIDE)
    torch.testing.assert_close(model(prompt, **inputs).logits, expected, rtol=1e-4, atol=1e-4)


def _prefixes(causal):
    causal[:, :, :6, :6] = causal[:, :, 6:, 6:] = True
    causal[:, :, 6:, :6] = False


@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "change"),
    [
        (torch.cat((torch.arange(6), torch.arange(10))), _prefixes),
        (torch.cat((torch.arange(6), torch.arange(10))), lambda x: x[:, :, 6:, :5].fill_(False)),
        (torch.tensor([*range(13), 3, 3, 3]), lambda x: x[:, :, 14:, 13:14].fill_(False)),
    ],
    ids=["packed prefixes", "half packed", "a tree"],
)
def test_masks_beside_positions_that_restart_are_checked(model, positions, change):
    causal = torch.ones(16, 16).tril().bool().repeat(1, 1, 1, 1)
    packed = causal.clone()
    packed[:, :, 6:, :6] = False
    restart = torch.cat((torch.arange(6), torch.arange(10)))[None]
    ids = token_ids(1, 16)
    expected = model(ids, position_ids=restart, use_cache=False).logits
    got = model(ids, position_ids=restart, attention_mask=packed, use_cache=False).logits
    torch.testing.assert_close(got, expected)
    change(causal)
    with pytest.raises(NotImplementedError, match="attention_mask asks for more"):
        model(ids, position_ids=positions[None], attention_mask=causal, use_cache=False)


@torch.no_grad()
def test_block_masks_are_refused_by_name(model):
    model.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match="BlockMask"):
        model(token_ids(1, 8))


@torch.no_grad()
def test_layers_can_stay_softmax(prompt):
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(0,))
    model = lo.hf.convert(tiny(), config)
    assert len(lo.hf.attention_layers(model)) == 1
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    options = {"attention_mask": mask}
    cached = generate(model, prompt, **options)
    assert torch.equal(cached, generate(model, prompt, use_cache=False, **options))


@pytest.mark.parametrize("softmax_layer", [0, 1])
def test_static_caches_serve_softmax_layers_as_well(softmax_layer, prompt):
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(softmax_layer,))
    model = lo.hf.convert(tiny(), config)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    static = generate(model, prompt, 32, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, generate(model, prompt, 32, attention_mask=mask, use_cache=False))


@torch.no_grad()
def test_a_mask_of_causality_and_padding_may_be_given_whole(model):
    ids, causal = token_ids(2, 20), torch.ones(20, 20).tril().bool().expand(2, 1, 20, 20)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected)
    padded = causal[:1] & (torch.arange(20) >= 5)  # for all sequences of the batch
    expected_padded = model(ids, attention_mask=(torch.arange(20) >= 5).expand(2, 20)).logits
    got = model(ids, attention_mask=padded).logits
    torch.testing.assert_close(got[:, 5:], expected_padded[:, 5:])
    additive = torch.zeros(causal.shape).masked_fill(~causal, -1e30)
    torch.testing.assert_close(model(ids, attention_mask=additive).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen3"])
def test_a_sliding_window_of_the_model_is_no_other_mask(family):
    sliding = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
    model = lo.hf.convert(tiny(family, **sliding), NARROW)
    ids, mask = token_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[1], model(ids[1:]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda causal: causal.fill_(True),
        lambda causal: causal[:, :, 10:, 2:5].fill_(False),
        lambda causal: causal[:, :, 10:, :10].fill_(False),
    ],
    ids=["bidirectional", "a hole", "blocks"],
)
@pytest.mark.parametrize("heads", [1, 4])
def test_other_masks_are_refused(model, change, heads):
    mask = torch.ones(20, 20).tril().bool().repeat(1, heads, 1, 1)
    model(token_ids(1, 20), attention_mask=mask)
    change(mask[:, -1:])
    with pytest.raises(NotImplementedError, match="attention_mask asks for more"):
        model(token_ids(1, 20), attention_mask=mask)


@torch.no_grad()
def test_a_layer_that_attends_twice_is_refused_a_cache(prompt):
    model = transformers.AutoModelForCausalLM.from_config(transformers.DiffLlamaConfig(**SHAPE))
    expected = model.eval()(prompt).logits
    lo.hf.convert(model, WIDE)
    got = model(prompt, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model(prompt)


@torch.no_grad()
def test_restore_is_exact():
    model, ids = tiny(), token_ids(1, 40)
    weights, config, logits = copy.deepcopy(model.state_dict()), model.config.to_dict(), None
    logits = model(ids).logits
    lo.hf.convert(model, NARROW)
    assert not torch.equal(model(ids).logits, logits)
    with lo.hf.use_mode(model, "softmax"):
        assert torch.equal(model(ids).logits, logits)
    lo.hf.restore(model)
    assert model.config.to_dict() == config
    assert type(model.config) is transformers.LlamaConfig
    assert model.state_dict().keys() == weights.keys()
    assert torch.equal(model(ids).logits, logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_saved_model_reloads_bitwise_and_restores(model, tmp_path):
    ids = token_ids(1, 40)
    for layer in lo.hf.attention_layers(model):
        layer.feature_q.normal_()
        layer.gate.normal_()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    for load in (lo.hf.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path)
        assert torch.equal(loaded(ids).logits, expected)
    lo.hf.restore(loaded)
    assert type(loaded) is transformers.LlamaForCausalLM
    with lo.hf.use_mode(model, "softmax"):
        assert torch.equal(loaded(ids).logits, model(ids).logits)


PICKLED = """
import pickle, sys
sys.stdout.buffer.write(pickle.dumps(pickle.load(sys.stdin.buffer)))
"""


def test_a_loaded_model_can_be_pickled_and_read_by_another_process(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, ids = lo.hf.from_pretrained(tmp_path), token_ids(1, 20)
    elsewhere = subprocess.run(
        [sys.executable, "-c", PICKLED],
        input=pickle.dumps(loaded),
        capture_output=True,
        check=True,
    )
    again = pickle.loads(elsewhere.stdout)
    assert (type(again), type(again.config)) == (type(loaded), type(loaded.config))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_from_pretrained_refuses_what_is_no_causal_language_model(tmp_path):
    body = transformers.LlamaModel(transformers.LlamaConfig(**SHAPE))
    lo.hf.convert(body, NARROW).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LlamaModel; only causal"):
        lo.hf.from_pretrained(tmp_path)


class MyLlama(transformers.LlamaForCausalLM):
    """A class of a user's own."""


@torch.no_grad()
def test_from_pretrained_loads_what_a_class_of_ones_own_saved(prompt, tmp_path):
    model = lo.hf.convert(MyLlama(transformers.LlamaConfig(**SHAPE)), NARROW).eval()
    model.save_pretrained(tmp_path)
    assert lo.hf.from_pretrained(tmp_path)(prompt).logits.equal(model(prompt).logits)


def test_weights_of_attention_are_refused(model, prompt):
    with pytest.raises(NotImplementedError, match="no output_attentions"):
        model(prompt, output_attentions=True)


def test_from_pretrained_refuses_a_softmax_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama model, not a converted one"):
        lo.hf.from_pretrained(tmp_path)


def test_parameters_stay_fp32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = lo.hf.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for candidate in (loaded, loaded.to(torch.float16)):
        (layer, _) = lo.hf.attention_layers(candidate)
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert loaded.dtype == torch.float16


def test_gradients_reach_features_although_a_cache_is_asked_for(model):
    ids = token_ids(2, 40)
    output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    for layer in lo.hf.attention_layers(model):
        assert all(p.grad is not None and p.grad.norm() > 0 for p in layer.parameters())
    with torch.no_grad(), pytest.raises(RuntimeError, match="no gradient"):
        model(ids[:, :1], past_key_values=output.past_key_values)


def test_a_model_converted_under_inference_mode_trains():
    model = tiny()
    with torch.inference_mode():
        lo.hf.convert(model, NARROW)
    ids = token_ids(1, 20)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in lo.hf.attention_layers(model)[0].parameters())


REFUSED = {
    "StableLm": (transformers.StableLmConfig, "AttentionInterface"),
    "Phi": (transformers.PhiConfig, "o_proj"),
    "Gemma2": (transformers.Gemma2Config, "attn_logit_softcapping"),
    "GptOss": (transformers.GptOssConfig, "sink"),
}


def test_layers_that_share_keys_are_refused():
    config = transformers.Gemma3nTextConfig(
        **{**SHAPE, "num_hidden_layers": 4}, vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2, layer_types=["full_attention"] * 4, hidden_size_per_layer_input=8,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3\] share cached keys and values"):
        lo.hf.convert(model, NARROW)
    lo.hf.convert(model, lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(1, 2, 3)))
    ids = token_ids(1, 12)
    assert torch.equal(generate(model, ids, 8), generate(model, ids, 8, use_cache=False))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"is_causal": False}, "not causal"), ({"head_dim": 512}, "512 dimensions")],
)
def test_models_that_no_kernel_could_run_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        lo.hf.convert(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)))


def test_dropout_of_attention_is_said_not_to_apply():
    model = tiny(attention_dropout=0.5)
    with pytest.warns(UserWarning, match=r"attention_dropout=0.5"):
        lo.hf.convert(model, NARROW)
    ids = token_ids(1, 12)
    model.train()(ids, labels=ids).loss.backward()
    assert lo.hf.restore(model).model.layers[0].self_attn.attention_dropout == 0.5


@torch.no_grad()
def test_models_of_one_config_stay_apart():
    config = transformers.LlamaConfig(**SHAPE)
    teacher, student = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    lo.hf.convert(student, NARROW)
    assert student.config.model_type == student.model.config.model_type == "lolcats"
    assert teacher.config is config
    assert (config.model_type, hasattr(config, "lolcats")) == ("llama", False)
    assert lo.hf.restore(student).config.to_dict() == config.to_dict()


@torch.no_grad()
def test_features_that_a_checkpoint_lacks_start_as_convert_starts_them(model, tmp_path):
    lo.hf.restore(copy.deepcopy(model)).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config)
    for a, b in zip(lo.hf.attention_layers(loaded), lo.hf.attention_layers(model), strict=True):
        for name, value in b.state_dict().items():
            assert torch.equal(a.state_dict()[name], value)


@torch.no_grad()
def test_offloaded_parameters_come_to_the_attention(model, prompt, tmp_path):
    expected = model(prompt).logits
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    torch.testing.assert_close(model(prompt).logits, expected)


def test_features_can_be_trained_as_modules_of_peft(model, prompt):
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lolcats"])
    )
    layers = lo.hf.attention_layers(adapted)
    assert [layer.gate.requires_grad for layer in layers] == [True, True]
    lo.hf.set_mode(adapted, "hybrid")
    assert isinstance(lo.hf.LolcatsCache(adapted, slack=4).layers[1], lo.hf.cache.LolcatsCacheLayer)
    with torch.no_grad():
        layers[0].gate += 1
        got, merged = adapted(prompt).logits, adapted.merge_and_unload()
        torch.testing.assert_close(merged(prompt).logits, got)
    assert torch.equal(lo.hf.attention_layers(merged)[0].gate, layers[0].gate)
    attention = merged.model.layers[0].self_attn
    with lo.hf.use_mode(merged, "softmax"):
        assert attention.config is merged.config
    lo.hf.restore(merged)
    assert attention.config is merged.config
    assert not hasattr(attention, "lolcats_softmax")


@torch.no_grad()
def test_a_converted_model_can_be_exported(model):
    ids = token_ids(2, 20)
    exported = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, strict=False
    ).module()
    got = exported(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_model_is_refused_by_name(name):
    config, reason = REFUSED[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE))
    with pytest.raises(ValueError, match=f"{name}ForCausalLM cannot be converted: .*{reason}"):
        lo.hf.convert(model, NARROW)
    assert not lo.hf.attention_layers(model)
    assert not hasattr(model.config, "lolcats")


def test_paged_cache_is_refused(model):
    with pytest.raises(NotImplementedError, match="paged"):
        model(token_ids(1, 4), cache=object())


def test_misuse_is_refused(model):
    with pytest.raises(ValueError, match="converted already"):
        lo.hf.convert(model)
    with pytest.raises(ValueError, match="not converted"):
        lo.hf.restore(tiny())
    with pytest.raises(ValueError, match=r"softmax_layers names \[7\]"):
        lo.hf.convert(tiny(), lo.hf.LolcatsConfig(softmax_layers=(7,)))
    with pytest.raises(ValueError, match="mode='none'"):
        lo.hf.set_mode(model, "none")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        lo.hf.convert(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config is a dict"):
        lo.hf.convert(tiny(), {"window": 8})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("window", -1, ValueError),
        ("window", 1.5, TypeError),
        ("window_kind", "round", ValueError),
        ("activation", "sin", ValueError),
        ("activation", "relu", ValueError),  # two_sided
        ("gate_init", float("nan"), ValueError),
        ("feature_dim", 0, ValueError),
    ],
)
def test_config_names_the_bad_field(field, value, error):
    with pytest.raises(error, match=field):
        lo.hf.LolcatsConfig(**{field: value})


def test_config_round_trips_and_refuses_unknown_keys():
    config = lo.hf.LolcatsConfig(window=32, softmax_layers=[1, 2])
    assert lo.hf.LolcatsConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="windw"):
        lo.hf.LolcatsConfig.from_dict({"windw": 3})
