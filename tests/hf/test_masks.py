"""Masks and packed sequences: what converted layers read of them, and what they refuse."""

import pytest
import torch
import transformers
from helpers.tiny_models import NARROW, SHAPE, WIDE, tiny, token_ids

import lolcats_ops as lo


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
def test_a_mask_of_causality_and_padding_may_be_given_whole(model):
    ids, causal = token_ids(2, 20), torch.ones(20, 20).tril().bool().expand(2, 1, 20, 20)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected)
    padded = causal[:1] & (torch.arange(20) >= 5)  # for all sequences of the batch
    expected_padded = model(ids, attention_mask=(torch.arange(20) >= 5).expand(2, 20)).logits
    positions = (torch.arange(20) - 5).clamp(min=0)[None]  # counted beside masks [B, T] alone
    got = model(ids, attention_mask=padded, position_ids=positions).logits
    torch.testing.assert_close(got[:, 5:], expected_padded[:, 5:])
    additive = torch.zeros(causal.shape).masked_fill(~causal, -1e30)
    torch.testing.assert_close(model(ids, attention_mask=additive).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_padding_changes_nothing_where_positions_are_not_given(model, embedded):
    ids, mask = token_ids(1, 25), (torch.arange(25) >= 5).long()[None]
    alone = model(ids[:, 5:]).logits

    def logits(tokens, **given):
        name = "inputs_embeds" if embedded else "input_ids"
        new = model.get_input_embeddings()(tokens) if embedded else tokens
        return model(**{name: new}, **given)

    torch.testing.assert_close(logits(ids, attention_mask=mask).logits[:, 5:], alone)
    filled = logits(ids[:, :15], attention_mask=mask[:, :15])
    cache = filled.past_key_values
    rest = logits(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, alone[:, 10:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "qwen2", "qwen3", "smollm3"])
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
def test_masks_by_kind_of_layer_are_checked_before_any_layer_runs():
    kinds = ["sliding_attention", "full_attention"]
    model = lo.hf.convert(tiny("gemma3", layer_types=kinds, sliding_window=8), NARROW)
    ids, full = token_ids(1, 20), torch.ones(20, 20).tril().bool().repeat(1, 1, 1, 1)
    masks = dict(zip(kinds, (full.triu(-7), full), strict=True))
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, attention_mask=masks).logits, expected)
    full[:, :, 2:6, 2:6] = True
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(NotImplementedError, match="attention_mask asks for more"):
        model(ids, attention_mask=masks, past_key_values=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_masks_that_the_model_makes_are_checked():
    config = transformers.HrmTextConfig(**SHAPE, prefix_lm=True)
    model = lo.hf.convert(transformers.AutoModelForCausalLM.from_config(config).eval(), NARROW)
    ids, prefix = token_ids(1, 20), torch.zeros(1, 20, dtype=torch.long)
    expected = model(ids, use_cache=False).logits
    got = model(ids, token_type_ids=prefix, use_cache=False).logits
    torch.testing.assert_close(got, expected)
    prefix[:, :6] = 1
    with pytest.raises(NotImplementedError, match="attention_mask asks for more"):
        model(ids, token_type_ids=prefix, use_cache=False)


@torch.no_grad()
def test_a_mask_is_checked_once_for_all_layers(model, prompt, monkeypatch):
    calls, check = [], lo.hf.patch.check_mask
    monkeypatch.setattr(lo.hf.patch, "check_mask", lambda *args: calls.append(1) or check(*args))
    causal = torch.ones(12, 12).tril().bool()[None, None]
    padding = torch.ones_like(prompt).index_fill_(1, torch.arange(3), 0)
    for mask, checks in ((causal, 1), (causal, 2), (padding, 3)):
        model(prompt, attention_mask=mask)
        assert len(calls) == checks


CAUSAL = torch.ones(20, 20).tril()[None, None]


@pytest.mark.parametrize(
    "mask",
    [CAUSAL, CAUSAL.long(), CAUSAL.log() + 0.5, (1 - CAUSAL) * -100, CAUSAL.log() * 0],
    ids=["ones", "integers", "a bias", "not very negative", "nan"],
)
def test_numbers_that_neither_attend_nor_block_are_refused(model, mask):
    with pytest.raises(NotImplementedError, match="0 to attend and at most -1000 to block"):
        model(token_ids(1, 20), attention_mask=mask)


@torch.no_grad()
def test_a_mask_may_block_by_any_very_negative_number(model):
    ids = token_ids(1, 20)
    expected = model(ids).logits
    for blocked in (CAUSAL.log(), ((1 - CAUSAL) * -1e4).bfloat16()):
        torch.testing.assert_close(model(ids, attention_mask=blocked).logits, expected)


@torch.no_grad()
def test_a_mask_that_shows_a_token_only_to_others_is_refused(model):
    mask = CAUSAL.bool().clone()
    mask[..., 5, 5] = False
    with pytest.raises(NotImplementedError, match="attention_mask asks for more"):
        model(token_ids(1, 20), attention_mask=mask)


@torch.no_grad()
@pytest.mark.parametrize("softmax_layers", [(), (0,)])
@pytest.mark.parametrize("whole", [False, True], ids=["of keys", "of queries and keys"])
@pytest.mark.parametrize("wrong", [slice(3, 9), slice(0, 2)], ids=["hides", "shows padding"])
def test_the_past_that_a_mask_shows_is_what_the_cache_holds(softmax_layers, whole, wrong):
    config = lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=softmax_layers)
    model, ids = lo.hf.convert(tiny(), config), token_ids(2, 30)
    cache = transformers.DynamicCache(config=model.config)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :2] = 0
    expected = model(ids, attention_mask=mask).logits[:, 20:]
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)

    def ask(shown):
        given = {"past_key_values": cache, "attention_mask": shown}
        if whole:
            given["position_ids"] = (mask.cumsum(1) - 1)[:, 20:]
            given["attention_mask"] = (
                shown.bool()[:, None, None] & torch.ones(30, 30).tril().bool()[20:]
            )
        return model(ids[:, 20:], **given).logits

    other = mask.clone()
    other[:, wrong] = 1 - other[:, wrong]
    with pytest.raises(ValueError, match=r"another number of tokens .* \[18, 20\]"):
        ask(other)
    torch.testing.assert_close(ask(mask), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_attention_are_refused(model, prompt):
    with pytest.raises(NotImplementedError, match="no output_attentions"):
        model(prompt, output_attentions=True)


def test_attention_of_later_tokens_is_refused(model, prompt):
    with pytest.raises(NotImplementedError, match="is causal"):
        model(prompt, is_causal=False)
    model(prompt, is_causal=True)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_transfer_leaves_padding_and_other_documents_out(packed):
    model, ids = lo.hf.convert(tiny(), NARROW), token_ids(1, 30)
    lo.hf.set_mode(model, "transfer")
    losses = []
    for layer in lo.hf.attention_layers(model):
        layer.learner = lambda attend, n: (losses.append(attend(slice(0, n))), losses[-1].teacher)[
            1
        ]
    model.model(ids, use_cache=False)
    if packed:
        positions = torch.arange(30).repeat(2)[None]
        model.model(ids.repeat(1, 2), position_ids=positions, use_cache=False)
    else:
        padded = torch.cat((token_ids(1, 9, seed=1), ids), 1)
        mask = torch.tensor([[0] * 9 + [1] * 30])
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # the maps see q and k after RoPE
        model.model(padded, attention_mask=mask, position_ids=positions, use_cache=False)
    for alone, beside in zip(losses[:2], losses[2:], strict=True):
        torch.testing.assert_close(beside.mse, alone.mse, rtol=1e-4, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("row", [1, 6, 11])
def test_masks_are_checked_a_few_rows_at_a_time(row, model, monkeypatch):
    monkeypatch.setattr("lolcats_ops.hf.attention.MASK_ROWS", 4)
    ids, mask = token_ids(1, 12), torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    model(ids, attention_mask=mask.clone(), use_cache=False)
    mask[:, :, row, 0] = False
    with pytest.raises(NotImplementedError, match="causal and has padding"):
        model(ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_padding_that_differs_by_head_is_refused(model):
    heads = model.config.num_attention_heads
    mask = torch.ones(12, 12, dtype=torch.bool).tril().repeat(1, heads, 1, 1)
    mask[:, 1, 3], mask[:, 1, :, 3] = False, False
    with pytest.raises(NotImplementedError, match="causal and has padding"):
        model(token_ids(1, 12), attention_mask=mask, use_cache=False)


@torch.no_grad()
def test_packed_masks_are_checked_a_few_rows_at_a_time(model, monkeypatch):
    monkeypatch.setattr("lolcats_ops.hf.attention.MASK_ROWS", 4)
    first = torch.arange(12) < 7
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None]
    mask = (torch.ones(12, 12, dtype=torch.bool).tril() & (first[:, None] == first))[None, None]
    model(token_ids(1, 12), attention_mask=mask, position_ids=positions, use_cache=False)


@torch.no_grad()
def test_padding_of_rows_follows_the_rows(model):
    """Stage 1 takes a batch in pieces: each has its own rows' padding."""
    ids, mask, seen = token_ids(2, 24), torch.ones(2, 24, dtype=torch.long), []
    mask[1, :7] = 0

    def learner(attend, batch):
        pieces = [attend(slice(i, i + 1)).teacher for i in range(batch)]
        seen.append((attend(slice(0, batch)).teacher, torch.cat(pieces)))
        return seen[-1][0]

    for layer in lo.hf.attention_layers(model):
        layer.learner = learner
    with lo.hf.use_mode(model, "transfer"):
        model.model(ids, attention_mask=mask, use_cache=False)
    for layer in lo.hf.attention_layers(model):
        layer.learner = None
    whole, in_pieces = seen[0]
    torch.testing.assert_close(in_pieces, whole)


@torch.no_grad()
def test_a_reset_cache_forgets_padding(model):
    cache, ids = lo.hf.LolcatsCache(model, slack=4), token_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    model(ids[:1], past_key_values=cache)
    cache.crop(-3)
    got = model(ids[:1, 9:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids[:1]).logits[:, 9:], rtol=1e-4, atol=1e-4)


def test_features_alone_are_trained_although_a_cache_is_asked_for(model):
    ids, layers = token_ids(2, 24), lo.hf.attention_layers(model)
    model.requires_grad_(False)
    for layer in layers:
        layer.requires_grad_(True)
    model(ids, labels=ids, use_cache=True).loss.backward()
    parameters = [p for layer in layers for p in layer.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in parameters)
