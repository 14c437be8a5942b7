"""Conversion of Hugging Face models and back, and saving: tiny random models, compared with
themselves."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from helpers.tiny_models import FAMILIES, NARROW, SHAPE, WIDE, tiny, token_ids

import lolcats_ops as lo


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_window_of_all_tokens_is_softmax_in_every_family(family):
    model, ids = tiny(family), token_ids(2, 40)
    expected = model(ids).logits
    lo.hf.convert(model, WIDE)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


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


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_a_checkpoint_is_saved_and_loaded_in_every_family(family, tmp_path):
    """Checkpoints of some have weights under other names than the model, or one by one."""
    ids = token_ids(1, 20)
    tiny(family).save_pretrained(tmp_path / "original")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    original = model(ids).logits
    expected = lo.hf.convert(model, NARROW)(ids).logits
    for name in ("first", "second"):  # what was loaded converted is saved and loaded as well
        model.save_pretrained(tmp_path / name)
        model = lo.hf.from_pretrained(tmp_path / name)
        assert torch.equal(model(ids).logits, expected)
    lo.hf.restore(model).save_pretrained(tmp_path / "restored")
    restored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert torch.equal(restored(ids).logits, original)
    assert type(restored.config) is FAMILIES[family]


@torch.no_grad()
def test_a_loaded_model_is_restored_and_converted_again(model, tmp_path):
    model.save_pretrained(tmp_path / "once")
    again = lo.hf.convert(lo.hf.restore(lo.hf.from_pretrained(tmp_path / "once")), WIDE)
    again.save_pretrained(tmp_path / "again")
    loaded = lo.hf.from_pretrained(tmp_path / "again")
    assert loaded.config.lolcats["window"] == WIDE.window
    assert torch.equal(loaded(token_ids(1, 20)).logits, again(token_ids(1, 20)).logits)
    assert type(lo.hf.restore(loaded).config) is type(lo.hf.restore(again).config)


def test_a_model_may_be_made_of_a_converted_ones_config(tmp_path):
    tiny().save_pretrained(tmp_path)  # what is read from a file has its model_type
    model = lo.hf.convert(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), NARROW)
    other = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(other.config) is type(model.config)
    assert type(lo.hf.restore(other).config) is transformers.LlamaConfig


def test_the_projection_of_favor_is_one_for_queries_and_keys_and_stays(tmp_path):
    favor = lo.hf.LolcatsConfig(
        window=8, feature_dim=16, activation="favor", two_sided=False, init="orthogonal"
    )
    model = lo.hf.convert(tiny(), favor)
    layer = lo.hf.attention_layers(model)[0]
    before = layer.feature_q.clone()
    assert torch.equal(layer.feature_k, before)
    report = lo.convert.transfer(model, token_ids(2, 40))
    assert report.parameters == sum(layer.gate.numel() for layer in lo.hf.attention_layers(model))
    assert torch.equal(layer.feature_q, before)
    model.save_pretrained(tmp_path)
    loaded = lo.hf.from_pretrained(tmp_path)
    assert torch.equal(lo.hf.attention_layers(loaded)[0].feature_k, before)
    with pytest.raises(ValueError, match="needs init='orthogonal'"):
        lo.hf.LolcatsConfig(activation="favor", two_sided=False)


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
    with pytest.warns(UserWarning, match="LlamaModel has no language model head"):
        lo.hf.convert(body, NARROW)
    body.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a LlamaModel; only causal"):
        lo.hf.from_pretrained(tmp_path)


def test_only_a_model_that_would_not_load_converted_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="nor of a model that holds it will load converted"):
        lo.hf.convert(tiny().model, NARROW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lo.hf.convert(MyLlama(transformers.LlamaConfig(**SHAPE)), NARROW).save_pretrained(tmp_path)
        lo.hf.from_pretrained(tmp_path)


def test_from_pretrained_finds_the_config_where_it_finds_the_model(model, prompt, tmp_path):
    model.save_pretrained(tmp_path / "sub")
    expected = model(prompt).logits
    for path, given in ((tmp_path, {}), (tmp_path / "sub", {"config": model.config})):
        options = given or {"subfolder": "sub", "local_files_only": True, "dtype": "auto"}
        assert torch.equal(lo.hf.from_pretrained(path, **options)(prompt).logits, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model_type": "futuremodel"}, "does not know that family"),
        ({"base_model_type": None}, "lacks 'base_model_type'"),
        ({"lolcats": None}, "lacks 'lolcats'"),
    ],
)
def test_from_pretrained_says_what_is_wrong_with_a_config(model, tmp_path, changes, reason):
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=reason):
        lo.hf.from_pretrained(tmp_path)


class MyLlama(transformers.LlamaForCausalLM):
    """A class of a user's own."""


@torch.no_grad()
def test_from_pretrained_loads_what_a_class_of_ones_own_saved(prompt, tmp_path):
    model = lo.hf.convert(MyLlama(transformers.LlamaConfig(**SHAPE)), NARROW).eval()
    model.save_pretrained(tmp_path)
    assert lo.hf.from_pretrained(tmp_path)(prompt).logits.equal(model(prompt).logits)


def test_from_pretrained_refuses_a_checkpoint_that_lacks_weights(model, tmp_path):
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks weights .* 1 in all: model\.layers\.1\.mlp"):
        lo.hf.from_pretrained(tmp_path)


def test_from_pretrained_refuses_a_checkpoint_without_feature_maps(model, tmp_path):
    weights = {n: x for n, x in model.state_dict().items() if ".lolcats.feature" not in n}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks weights .*\.lolcats\.feature"):
        lo.hf.from_pretrained(tmp_path)


def test_use_mode_gives_every_layer_its_own_mode_back(model):
    first, *others = lo.hf.attention_layers(model)
    first.mode = "softmax"
    with lo.hf.use_mode(model, "transfer"):
        assert {layer.mode for layer in lo.hf.attention_layers(model)} == {"transfer"}
    assert [layer.mode for layer in (first, *others)] == ["softmax", *["hybrid"] * len(others)]


def test_from_pretrained_refuses_what_was_saved_without_its_features(model, tmp_path):
    model.save_pretrained(tmp_path / "converted")
    softmax = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "converted")
    softmax.save_pretrained(tmp_path / "softmax")
    with pytest.raises(ValueError, match="saved as a llama model, without its features"):
        lo.hf.from_pretrained(tmp_path / "softmax")


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


class Logits(torch.nn.Module):
    """What torch.jit.trace takes: parameters of its own, and a tensor that comes out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of the tracer, and that torch deprecates it
def test_a_trace_without_padding_takes_padding(model):
    logits, ids, mask = Logits(model), token_ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    traced = torch.jit.trace(logits, (ids, mask))
    padded = mask.clone()
    padded[1, :9] = 0
    difference = traced(ids, padded) - logits(ids, padded)
    assert (difference * padded[..., None]).abs().max() < 1e-4
