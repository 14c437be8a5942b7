"""Both training stages, data, perplexity and configuration, on tiny random models."""

import math

import peft
import pytest
import torch
import transformers
from helpers import tiny_models

import lolcats_ops as lo
from lolcats_ops.convert import ConversionConfig, FinetuneConfig, TransferConfig

NARROW = lo.hf.LolcatsConfig(window=8, feature_dim=16)
QUICK = {"learning_rate": 1e-2, "gradient_accumulation": 1}


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


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"junk " * 20])
def test_a_checkpoint_of_other_bytes_is_named(content, model, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt is no whole checkpoint .*; delete it"):
        lo.convert.transfer(model, token_rows(1, 40), checkpoint=tmp_path / "state.pt")


def test_a_file_is_on_the_disk_before_it_replaces_another(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("os.fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr("os.replace", lambda *_: calls.append("replace"))
    lo.convert.transfer(
        lo.hf.convert(tiny(), NARROW), token_rows(1, 40), checkpoint=tmp_path / "state.pt"
    )
    assert calls == ["fsync", "replace"]


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
    whole, half = (lo.hf.convert(tiny(), NARROW) for _ in range(2))
    config = FinetuneConfig(**QUICK, train_features=True, merge=False)
    expected = lo.convert.finetune(whole, rows, config, output_dir=tmp_path / "run").model
    (tmp_path / "run" / "checkpoint-8").rename(tmp_path / "run" / "checkpoint-8.bak")
    output = {"output_dir": tmp_path / "run", "resume": True}
    report = lo.convert.finetune(half, rows, config, **output)
    assert len(report.losses) == 4
    expected.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(lo.hf.convert(tiny(), NARROW), tmp_path / "adapter")
    start = lo.hf.attention_layers(lo.hf.convert(tiny(), NARROW))
    for model in (report.model, loaded):
        layers = zip(lo.hf.attention_layers(model), lo.hf.attention_layers(expected), strict=True)
        for i, (a, b) in enumerate(layers):
            torch.testing.assert_close(a.feature_q, b.feature_q)
            assert not torch.equal(a.feature_q, start[i].feature_q)
    with pytest.raises(ValueError, match="not converted"):
        lo.convert.finetune(tiny(), rows, config)


def test_lora_adapts_all_linear_layers_of_the_attention():
    model = tiny_models.tiny("phi3")
    tuned = FinetuneConfig(**QUICK, max_steps=1, merge=False)
    adapted = lo.convert.finetune(model, token_rows(1, 40), tuned).model
    lora = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert lora == {"qkv_proj", "o_proj"}


def test_a_target_that_no_module_has_is_named(model):
    config = FinetuneConfig(target_modules=("o_proj", "v_prj", "proj"))
    have = r"\['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"
    with pytest.raises(ValueError, match=rf"\['proj', 'v_prj'\] names no module; .*{have}"):
        lo.convert.finetune(model, token_rows(1, 40), config)
    with pytest.raises(ValueError, match="at least 1"):
        FinetuneConfig(target_modules=())


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("other", ["model", "features", "data", "configuration", "silence"])
def test_finetune_resumes_nothing_else(other, resume, tmp_path):
    rows, config = token_rows(2, 40), FinetuneConfig(**QUICK, epochs=1)
    lo.convert.finetune(lo.hf.convert(tiny(), NARROW), rows, config, output_dir=tmp_path)
    model, reason = lo.hf.convert(tiny(), NARROW), f"was begun with another {other};"
    if other == "model":
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1
    if other == "features":
        lo.hf.attention_layers(model)[1].gate.data[0] += 1
        reason = "another model;"
    if other == "data":
        rows[1, 3] += 1
    if other == "configuration":
        config = FinetuneConfig(**QUICK, epochs=1, rank=4)
    if other == "silence":
        (tmp_path / "origin.json").unlink()
        reason = "does not say what it was begun with;"
    with pytest.raises(ValueError, match=reason):
        lo.convert.finetune(model, rows, config, output_dir=tmp_path, resume=resume)


def test_what_decides_nothing_does_not_keep_finetune_from_resuming(tmp_path):
    rows, names = token_rows(2, 40), ("v_proj", "o_proj", "q_proj", "k_proj")
    config = FinetuneConfig(**QUICK, epochs=1, merge=False)
    lo.convert.finetune(lo.hf.convert(tiny(), NARROW), rows, config, output_dir=tmp_path)
    other, model = FinetuneConfig(**QUICK, epochs=1, target_modules=names), tiny()
    report = lo.convert.finetune(
        lo.hf.convert(model, NARROW), rows.int(), other, output_dir=tmp_path, resume=True
    )
    assert report.losses == []


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt"],
)
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(name, tmp_path):
    rows, config = token_rows(2, 40), FinetuneConfig(**QUICK, epochs=3)

    def run(**options):
        model = lo.hf.convert(tiny(), NARROW)
        return lo.convert.finetune(model, rows, config, output_dir=tmp_path, **options)

    expected = run().losses
    last = tmp_path / "checkpoint-6" / name
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="checkpoint-6 is incomplete, and passed over"):
        assert run(resume=True).losses == pytest.approx(expected[4:])
    assert run(resume=True).losses == []  # it was written anew
    for path in tmp_path.glob(f"checkpoint-*/{name}"):
        path.unlink()
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert run(resume=True).losses == pytest.approx(expected)
    passed = "".join(str(warning.message) for warning in warned)
    assert all(f"checkpoint-{step} is incomplete" in passed for step in (2, 4, 6))


@pytest.mark.parametrize("train_features", [True, False])
def test_an_interrupted_finetune_leaves_the_model_as_it_was(model, train_features):
    def state():
        tensors = {name: x.clone() for name, x in model.state_dict(keep_vars=True).items()}
        flags = {name: x.requires_grad for name, x in model.named_parameters()}
        modes = {name: (type(m), m.training) for name, m in model.named_modules()}
        return tensors, flags, modes, model.config.use_cache

    def interrupt(*_):
        if model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.any():  # has trained
            raise KeyboardInterrupt

    model.eval()
    model.model.embed_tokens.requires_grad_(False)
    model.config.use_cache = True
    before = state()
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    config = FinetuneConfig(**QUICK, train_features=train_features)
    with pytest.raises(KeyboardInterrupt):
        lo.convert.finetune(model, token_rows(4, 40), config)
    hook.remove()
    after = state()
    assert after[1:] == before[1:]
    assert all(torch.equal(before[0][name], x) for name, x in after[0].items())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_a_model_keeps_its_mode(model, training, stage):
    def fail(*_):
        raise RuntimeError("no")

    model.train(training)
    done = stage(model, token_rows(1, 40))
    assert getattr(done, "model", model).training == training
    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        stage(model, token_rows(1, 40))
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("training", [True, False])
def test_adapters_that_are_not_merged_are_in_the_mode_of_the_model(model, training):
    config = FinetuneConfig(**QUICK, max_steps=1, dropout=0.1, merge=False)
    adapted = lo.convert.finetune(model.train(training), token_rows(1, 40), config).model
    assert {module.training for module in adapted.modules()} == {training}


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
        finetune=FinetuneConfig(target_modules=("q_proj",)),
    )
    config.save(tmp_path / "c.yaml")
    assert ConversionConfig.load(tmp_path / "c.yaml") == config
    ConversionConfig().save(tmp_path / "d.yaml")
    assert ConversionConfig.load(tmp_path / "d.yaml") == ConversionConfig()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("transfer: {epoch: 1}", r": transfer\.epoch: Extra inputs"),
        ("transfer: {mse: 0, xent: 0}", ": transfer: .* mse and xent are both 0"),
        ("data: {length: 1}", r": data\.length: .* greater than or equal to 2"),
        ("lolcats: {sink: -1}", ": lolcats: .* sink=-1 must be >= 0"),
        ("- transfer", " is a list, needs a mapping"),
        ("transfer", " is a str, needs a mapping"),
        ("''", " is a str, needs a mapping"),
        ("lolcats: [", " is not YAML"),
        (b"\xff\xfa\x00", " is not YAML"),
    ],
)
def test_a_configuration_that_is_wrong_is_named(content, reason, tmp_path):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"c\.yaml{reason}"):
        ConversionConfig.load(tmp_path / "c.yaml")


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_data_of_a_wrong_shape_is_refused(model, stage):
    with pytest.raises(ValueError, match=r"data is \[5\], needs \[N, T\]"):
        stage(model, torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("stage", [lo.convert.finetune, lo.convert.evaluate])
def test_rows_of_one_token_predict_nothing(model, stage):
    with pytest.raises(ValueError, match=r"data is \[3, 1\], needs \[N, T\] with .* T >= 2"):
        stage(model, token_rows(3, 1))


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune, lo.convert.evaluate])
def test_data_that_are_no_tokens_of_the_model_are_refused(model, stage):
    rows = token_rows(2, 40)
    for data, kind in ((rows.tolist(), "a list"), (rows.float(), "float32"), (rows > 0, "bool")):
        with pytest.raises(TypeError, match=f"data is .*{kind}, needs an integer tensor"):
            stage(model, data)
    for wrong, bounds in ((97, "0 to 97"), (-1, "-1 to 96")):
        rows[0, 0], rows[0, 1], rows[0, 2] = wrong, 0, min(96, abs(wrong) * 96)
        with pytest.raises(ValueError, match=f"ids from {bounds}, the model's vocabulary 97"):
            stage(model, rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_token_rows_have_any_integer_dtype(model, dtype):
    rows = token_rows(1, 40)
    expected = lo.convert.evaluate(model, rows)
    assert lo.convert.evaluate(model, rows.to(dtype)) == expected


@pytest.mark.parametrize(
    ("texts", "length", "error"), [("one string", 2, TypeError), (["a b"], 0, ValueError)]
)
def test_pack_names_what_is_wrong(texts, length, error):
    with pytest.raises(error, match=r"^pack: "):
        lo.convert.pack(texts, None, length)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="bytes is not UTF-8 text"):
        lo.convert.read_texts([tmp_path / "bytes"])


def test_an_unconverted_model_has_nothing_to_transfer():
    with pytest.raises(ValueError, match="not converted"):
        lo.convert.transfer(tiny(), token_rows(1, 8))


def test_a_layer_without_values_keeps_finite_features(model):
    """A pruned one: its teacher is 0, and has no variance to be normalized by."""
    torch.nn.init.zeros_(model.model.layers[0].self_attn.v_proj.weight)
    lo.convert.transfer(model, token_rows(2, 32))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_ends_finetune_and_changes_nothing(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = FinetuneConfig(learning_rate=1e38, warmup=0, gradient_accumulation=1)
    with pytest.raises(RuntimeError, match=r"the loss of step \d+ is .*1e\+38 may be too large"):
        lo.convert.finetune(model, token_rows(4, 32), config)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_what_a_stage_cannot_begin_with_is_refused_before_it_trains(model, tmp_path):
    rows = token_rows(2, 32)
    before = lo.hf.attention_layers(model)[0].gate.clone()
    with pytest.raises(FileNotFoundError, match="is in no folder that exists"):
        lo.convert.transfer(model, rows, checkpoint=tmp_path / "no" / "stage1.pt")
    with pytest.raises(TypeError, match="config is a dict, needs a TransferConfig"):
        lo.convert.transfer(model, rows, {})
    with pytest.raises(TypeError, match="config is a TransferConfig, needs a FinetuneConfig"):
        lo.convert.finetune(model, rows, TransferConfig())
    with pytest.raises(ValueError, match="resume=True without an output_dir"):
        lo.convert.finetune(model, rows, resume=True)
    assert torch.equal(lo.hf.attention_layers(model)[0].gate, before)
    config = FinetuneConfig(max_steps=1, merge=False)
    adapted = lo.convert.finetune(model, rows, config).model
    with pytest.raises(ValueError, match="the model has adapters"):
        lo.convert.finetune(adapted, rows, config)


def test_a_text_that_is_named_twice_is_read_twice(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("words")
    assert lo.convert.read_texts([path, path]) == ["words", "words"]
    with pytest.raises(TypeError, match="one path, needs a list"):
        lo.convert.read_texts(str(path))
    with pytest.raises(ValueError, match="at least one text"):
        lo.convert.pack([], tiny_models.word_tokenizer("a"), 2)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("lolcats", "window", True),
        ("lolcats", "window", 10**20),
        ("lolcats", "affine", "yes"),
        ("transfer", "batch_size", True),
        ("transfer", "learning_rate", math.inf),
        ("finetune", "seed", -1),
        ("finetune", "seed", 2**33),
    ],
)
def test_values_of_a_configuration_are_not_turned_into_others(section, field, value):
    with pytest.raises(ValueError, match=field):
        ConversionConfig(**{section: {field: value}})


@pytest.mark.parametrize("stage", [lo.convert.transfer, lo.convert.finetune])
def test_a_stage_trains_under_inference_mode(model, stage):
    with torch.inference_mode():
        assert stage(model, token_rows(2, 32)).losses
