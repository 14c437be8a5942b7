"""Generation with states in the place of keys and values, compared with that without a cache."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from helpers.tiny_models import FAMILIES, NARROW, SHAPE, WIDE, generate, tiny, token_ids

import lolcats_ops as lo


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_cached_generation_equals_uncached_with_left_padding(family, prompt):
    untied = {"tie_word_embeddings": False}  # else Gemma repeats its last token
    model = lo.hf.convert(tiny(family, **untied), NARROW)
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


@pytest.mark.parametrize("padding", [0, 5])
def test_beam_search_reorders_the_state(model, prompt, padding):
    options = {"num_beams": 3, "attention_mask": torch.ones_like(prompt)}
    options["attention_mask"][0, :padding] = 0
    cached = generate(model, prompt, 32, **options)
    assert torch.equal(cached, generate(model, prompt, 32, use_cache=False, **options))


def test_a_padded_prompt_may_be_generated_from_in_chunks(model, prompt):
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    chunks = generate(model, prompt, 32, attention_mask=mask, prefill_chunk_size=4)
    assert torch.equal(chunks, generate(model, prompt, 32, attention_mask=mask))


@torch.no_grad()
def test_a_turn_padded_on_the_right_is_continued(model):
    ids, mask = token_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, 9:12] = 0
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
    got = generate(model, ids, 16, attention_mask=mask, past_key_values=cache)
    assert torch.equal(got, generate(model, ids, 16, attention_mask=mask, use_cache=False))


def test_generation_from_static_cache_equals_dynamic(model, prompt):
    static = generate(model, prompt, 32, cache_implementation="static")
    assert torch.equal(static, generate(model, prompt, 32))


def test_speculated_tokens_are_taken_back(model, prompt):
    cache = lo.hf.LolcatsCache(model, slack=8)
    options = {"past_key_values": cache, "prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(model, prompt[:1], **options), generate(model, prompt[:1]))


LOCAL = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gemma3", LOCAL)])
def test_what_an_assistant_proposes_needs_a_slack_of_20(family, changes, prompt):
    model, assistant = lo.hf.convert(tiny(family, **changes), NARROW), tiny(family, **changes)
    assistant.generation_config.assistant_confidence_threshold = 0  # proposes all, however unsure

    def assisted(slack):
        cache = lo.hf.LolcatsCache(model, slack=slack)
        return generate(model, prompt[:1], past_key_values=cache, assistant_model=assistant)

    assert torch.equal(assisted(20), generate(model, prompt[:1]))
    with pytest.raises(ValueError, match=r"slack.* 16"):
        assisted(16)


@torch.no_grad()
def test_local_layers_take_back_what_states_do_and_do_not_grow():
    model = lo.hf.convert(tiny("gemma3", **LOCAL), NARROW)
    ids, cache = token_ids(2, 60), lo.hf.LolcatsCache(model, slack=6)
    expected, start = model(ids).logits, 0
    for tokens, back in ((5, 2), (20, 6), (1, 0), (2, 1), (10, 3), (6, 4)):
        got = model(ids[:, start : start + tokens], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[:, start : start + tokens], rtol=1e-4, atol=1e-4)
        for _ in range(back):  # one after the other is as good as all at once
            cache.crop(-1)
        start += tokens - back
        assert cache.layers[0].keys.shape[2] <= 8 - 1 + 6


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


@torch.no_grad()
def test_a_crop_that_a_local_layer_refuses_changes_no_layer():
    model = lo.hf.convert(tiny("gemma3", **LOCAL), WIDE)
    ids, cache = token_ids(1, 40), lo.hf.LolcatsCache(model, slack=2)
    model(ids[:, :30], past_key_values=cache)  # no state has absorbed any
    with pytest.raises(ValueError, match="sliding window"):
        cache.crop(-5)
    got = model(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits[:, 30:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_positive_crop_is_a_length_for_every_layer():
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(0,))
    model, ids = lo.hf.convert(tiny(), config), token_ids(1, 24)
    cache = lo.hf.LolcatsCache(model, slack=6)
    model(ids[:, :20], past_key_values=cache)
    for length in (40, 17):
        cache.crop(length)
        assert [layer.get_seq_length() for layer in cache.layers] == [min(length, 20)] * 2
    got = model(ids[:, 17:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits[:, 17:], rtol=1e-4, atol=1e-4)


def test_a_cache_is_refused_what_it_cannot_use(model):
    for slack, error in ((-3, ValueError), ("3", TypeError), (True, TypeError)):
        with pytest.raises(error, match="LolcatsCache: slack is "):
            lo.hf.LolcatsCache(model, slack=slack)
    with pytest.raises(ValueError, match="LolcatsCache: LlamaForCausalLM is not converted"):
        lo.hf.LolcatsCache(tiny())


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
@pytest.mark.parametrize("softmax_layer", [0, 1])
def test_static_caches_serve_softmax_layers_without_a_mask(softmax_layer):
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(softmax_layer,))
    model, ids = lo.hf.convert(tiny(), config), token_ids(2, 20)
    expected = model(ids, use_cache=False).logits
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    got = [model(ids[:, i:j], past_key_values=cache).logits for i, j in ((0, 9), (9, 10), (10, 20))]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-4)


def test_static_caches_that_are_made_early_keep_no_room_for_keys(model, prompt):
    def held(length):
        cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        sizes = {"batch_size": 2, "num_heads": 2, "head_dim": 16}
        cache.early_initialization(**sizes, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        assert all(layer.instead_of.keys is None for layer in cache.layers)
        return lo.hf.cache_bytes(cache)

    assert held(100) == held(100_000)


def test_what_inference_mode_has_cached_can_be_taken_back_outside(model, prompt):
    def cropped(mode):
        cache = lo.hf.LolcatsCache(model, slack=6)
        with mode():
            model(prompt, past_key_values=cache)
        cache.crop(-3)
        with torch.no_grad():
            return model(prompt[:, -3:], past_key_values=cache).logits

    assert torch.equal(cropped(torch.inference_mode), cropped(torch.no_grad))


def test_static_caches_serve_local_layers_as_well():
    """Text that is shorter than their window."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    changes = {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 64}
    torch.manual_seed(0)
    config = FAMILIES["gemma3"](**{**SHAPE, **changes, "tie_word_embeddings": False})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    lo.hf.convert(model, NARROW)
    options = {"return_dict_in_generate": True, "output_logits": True}
    static, none = (
        torch.stack(generate(model, token_ids(2, 5), 10, **options, **cache).logits)
        for cache in ({"cache_implementation": "static"}, {"use_cache": False})
    )
    torch.testing.assert_close(static, none, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_which_tokens_are_padding_follows_the_sequences(model):
    """Through tokens after it that are all real, reordering and a second crop."""
    ids, mask = token_ids(2, 44), torch.ones(2, 44, dtype=torch.long)
    mask[0, 35:38] = 0
    cache = lo.hf.LolcatsCache(model, slack=8)
    for piece in (slice(0, 40), slice(40, 44)):
        model(ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=cache)
    lengths = [cache.layers[0].state.length.tolist()]
    for change in (
        lambda: cache.crop(-5),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.crop(-3),
    ):
        change()
        lengths.append(cache.layers[0].state.length.tolist())
    assert lengths == [[41, 44], [36, 39], [39, 36], [36, 35]]
