"""Both training stages, data, perplexity and configuration, on tiny random models."""

import math
import shutil

import peft
import pytest
import torch
import transformers

import lolcats_ops as lo
from lolcats_ops.convert import ConversionConfig, FinetuneConfig, TransferConfig

NARROW = lo.hf.LolcatsConfig(window=8, feature_dim=16)


def tiny(layers=2):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )


def token_rows(rows, length):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return lo.hf.convert(tiny(), NARROW)


def test_transfer_lowers_the_loss_of_every_layer(model):
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lolcats" not in n}
    config = TransferConfig(batch_size=4, rounds=4, epochs=4)
    report = lo.convert.transfer(model, token_rows(8, 64), config)
    assert [len(layer) for layer in report.losses] == [8 * 4 * 4] * 2
    for layer in report.losses:
        assert sum(layer[-8:]) < 0.9 * sum(layer[:8])
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    assert {layer.mode for layer in lo.hf.attention_layers(model)} == {"hybrid"}


def test_transfer_feeds_each_layer_the_softmax_model(model):
    rows, seen = token_rows(1, 40), []
    hook = model.model.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    lo.convert.transfer(model, rows, TransferConfig(batch_size=1))
    with torch.no_grad(), lo.hf.use_mode(model, "softmax"):
        model(rows)
    hook.remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)


def test_transfer_keeps_no_graph_across_layers(model):
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    lo.convert.transfer(model, token_rows(1, 40), TransferConfig(batch_size=1))
    assert len(inputs) == 2
    assert not any(x.requires_grad for x in inputs)
    assert all(p.grad is None for p in model.parameters())


def test_transfer_does_not_run_the_language_model_head(model):
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    lo.convert.transfer(model, token_rows(1, 40), TransferConfig(batch_size=1))


def test_interrupted_transfer_resumes_to_the_same_parameters(tmp_path):
    rows, config = token_rows(6, 40), TransferConfig(batch_size=2, epochs=2)
    whole, parts = (lo.hf.convert(tiny(), NARROW) for _ in range(2))
    expected = lo.convert.transfer(whole, rows, config)

    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = parts.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lo.convert.transfer(parts, rows, config, checkpoint=tmp_path / "state.pt")
    hook.remove()
    resumed = lo.hf.convert(tiny(), NARROW)
    report = lo.convert.transfer(resumed, rows, config, checkpoint=tmp_path / "state.pt")
    assert report.losses == expected.losses
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("other", ["model", "data", "configuration"])
def test_transfer_resumes_nothing_else(other, tmp_path):
    begun, rows, config = lo.hf.convert(tiny(), NARROW), token_rows(2, 40), TransferConfig()
    lo.convert.transfer(begun, rows, config, checkpoint=tmp_path / "state.pt")
    model = lo.hf.convert(tiny(), NARROW)
    if other == "model":
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1
    if other == "data":
        rows[1, 3] += 1
    if other == "configuration":
        config = TransferConfig(learning_rate=1e-3)
    with pytest.raises(ValueError, match=f"begun with another {other};"):
        lo.convert.transfer(model, rows, config, checkpoint=tmp_path / "state.pt")


def test_transfer_warns_of_a_teacher_that_the_model_has_not_been():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    shape |= {"vocab_size": 97, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MistralConfig(**shape, sliding_window=16)
    model = lo.hf.convert(transformers.MistralForCausalLM(config), NARROW)
    with pytest.warns(UserWarning, match="longer than the sliding window of 16"):
        lo.convert.transfer(model, token_rows(1, 40))


@pytest.mark.parametrize("options", [{"normalize": False}, {"xent": 0.1}, {"micro_batch": 3}])
def test_transfer_options_train(model, options):
    report = lo.convert.transfer(
        model, token_rows(6, 40), TransferConfig(batch_size=6, rounds=8, **options)
    )
    assert all(layer[-1] < layer[0] for layer in report.losses)


def test_finetune_lowers_the_loss_with_features_frozen(model):
    features = [p.clone() for layer in lo.hf.attention_layers(model) for p in layer.parameters()]
    rows = token_rows(1, 40).expand(8, -1)
    config = FinetuneConfig(learning_rate=1e-2, max_steps=6, gradient_accumulation=1)
    report = lo.convert.finetune(model, rows, config)
    assert len(report.losses) == 6
    assert report.losses[-1] < report.losses[0] - 0.1
    after = [p for layer in lo.hf.attention_layers(report.model) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(features, after, strict=True))


def test_finetune_leaves_the_cache_in_use(model):
    model.config.use_cache = True
    config = FinetuneConfig(max_steps=1, gradient_accumulation=1)
    tuned = lo.convert.finetune(model, token_rows(2, 40), config).model
    assert tuned.config.use_cache


def test_finetune_can_train_features(model):
    before = lo.hf.attention_layers(model)[0].feature_q.detach().clone()
    config = FinetuneConfig(
        learning_rate=1e-2, max_steps=2, gradient_accumulation=1, train_features=True
    )
    report = lo.convert.finetune(model, token_rows(2, 40), config)
    assert not torch.equal(lo.hf.attention_layers(report.model)[0].feature_q, before)


def test_trained_features_are_in_checkpoints_and_adapters(tmp_path):
    rows = token_rows(4, 40)
    options = {"learning_rate": 1e-2, "gradient_accumulation": 1, "train_features": True}
    whole, half = (lo.hf.convert(tiny(), NARROW) for _ in range(2))
    config = FinetuneConfig(**options, epochs=2, merge=False)
    expected = lo.convert.finetune(whole, rows, config, output_dir=tmp_path / "whole").model
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "half" / "checkpoint-4")
    output = {"output_dir": tmp_path / "half", "resume": True}
    resumed = lo.convert.finetune(half, rows, config, **output).model
    expected.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(lo.hf.convert(tiny(), NARROW), tmp_path / "adapter")
    start = lo.hf.attention_layers(lo.hf.convert(tiny(), NARROW))
    for model in (resumed, loaded):
        layers = zip(lo.hf.attention_layers(model), lo.hf.attention_layers(expected), strict=True)
        for i, (a, b) in enumerate(layers):
            torch.testing.assert_close(a.feature_q, b.feature_q)
            assert not torch.equal(a.feature_q, start[i].feature_q)
    with pytest.raises(ValueError, match="not converted"):
        lo.convert.finetune(tiny(), rows, config)
    for change in ({"rank": 4}, {"train_features": False}):
        other, model = FinetuneConfig(**options | change), lo.hf.convert(tiny(), NARROW)
        with pytest.raises(ValueError, match="was begun with"):
            lo.convert.finetune(model, rows, other, **output)


def test_merged_model_computes_what_the_adapters_computed(model):
    rows, config = token_rows(2, 40), FinetuneConfig(max_steps=2, learning_rate=1e-2, merge=False)
    adapted = lo.convert.finetune(model, rows, config).model.eval()
    with torch.no_grad():
        expected = adapted(rows).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(rows).logits, expected, rtol=1e-3, atol=1e-3)


def test_perplexity_is_that_of_the_loss(model):
    rows = token_rows(3, 40)
    with torch.no_grad():
        expected = math.exp(model.eval()(rows, labels=rows).loss)
    assert lo.convert.evaluate(model, rows, batch_size=2) == pytest.approx(expected, rel=1e-4)


def test_config_round_trips_through_yaml(tmp_path):
    config = ConversionConfig(
        lolcats=lo.hf.LolcatsConfig(window=32, softmax_layers=(1,)),
        transfer=TransferConfig(rounds=3),
    )
    config.save(tmp_path / "c.yaml")
    assert ConversionConfig.load(tmp_path / "c.yaml") == config
    (tmp_path / "d.yaml").write_text("transfer: {epoch: 1}\n")
    with pytest.raises(ValueError, match=r"transfer\.epoch"):
        ConversionConfig.load(tmp_path / "d.yaml")


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_data_of_a_wrong_shape_is_refused(model, stage):
    with pytest.raises(ValueError, match=r"data is \[5\], needs \[N, T\]"):
        stage(model, torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize(
    ("texts", "length", "error"), [("one string", 2, TypeError), (["a b"], 0, ValueError)]
)
def test_pack_names_what_is_wrong(texts, length, error):
    with pytest.raises(error, match=r"^pack: "):
        lo.convert.pack(texts, None, length)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "config").write_text("lolcats: [")
    with pytest.raises(ValueError, match="bytes is not UTF-8 text"):
        lo.convert.read_texts([tmp_path / "bytes"])
    with pytest.raises(ValueError, match="config is not YAML"):
        lo.convert.ConversionConfig.load(tmp_path / "config")


def test_an_unconverted_model_has_nothing_to_transfer():
    with pytest.raises(ValueError, match="not converted"):
        lo.convert.transfer(tiny(), token_rows(1, 8))
