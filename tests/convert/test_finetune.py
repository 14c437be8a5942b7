"""Stage 2, on tiny random models."""

import peft
import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.training import NARROW, QUICK, tiny, token_rows
from safetensors import SafetensorError

import lolcats_ops as lo
from lolcats_ops.convert import FinetuneConfig


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
    config = FinetuneConfig(**QUICK, train_features=True, merge=False, save_steps=3)
    expected = lo.convert.finetune(whole, rows, config, output_dir=tmp_path / "run").model
    (tmp_path / "run" / "checkpoint-8").rename(tmp_path / "run" / "checkpoint-8.bak")
    output = {"output_dir": tmp_path / "run", "resume": True}
    report = lo.convert.finetune(half, rows, config, **output)
    assert len(report.losses) == 2  # from the midst of an epoch on
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


def test_lora_adapts_no_other_module_of_the_same_name():
    layers = {"num_hidden_layers": 2, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = transformers.AfmoeForCausalLM(
        transformers.AfmoeConfig(**{**tiny_models.SHAPE, "head_dim": 16, **layers, **experts})
    )
    tuned = FinetuneConfig(**QUICK, max_steps=1, merge=False)
    adapted = lo.convert.finetune(lo.hf.convert(model, NARROW), token_rows(1, 40), tuned).model
    lora = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert any("self_attn.gate_proj" in name for name in lora)
    assert not any("mlp" in name for name in lora)


def test_adapters_have_the_rank_alpha_and_dropout_of_the_settings(model):
    config = FinetuneConfig(**QUICK, max_steps=1, merge=False, rank=3, alpha=12, dropout=0.25)
    adapted = lo.convert.finetune(model, token_rows(1, 40), config).model
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 4 * len(lo.hf.attention_layers(adapted))
    for layer in layers:
        (rank,), (scaling,), (dropout,) = (
            settings.values() for settings in (layer.r, layer.scaling, layer.lora_dropout)
        )
        assert (rank, scaling, dropout.p) == (3, 4.0, 0.25)


def test_gradients_of_accumulated_batches_are_those_of_one_batch():
    rows = token_rows(8, 32)

    def tuned(batch_size, gradient_accumulation):
        config = FinetuneConfig(
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            epochs=1,
            learning_rate=1e-2,
            warmup=0,
        )
        report = lo.convert.finetune(tiny(), rows, config)
        assert len(report.losses) == len(rows) // (batch_size * gradient_accumulation)
        return report.model.state_dict()

    once, accumulated = tuned(4, 1), tuned(1, 4)
    assert not all(x.equal(tiny().state_dict()[name]) for name, x in once.items())
    for name, x in once.items():
        torch.testing.assert_close(accumulated[name], x, rtol=1e-3, atol=1e-5)


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
    rows, config = token_rows(2, 40), FinetuneConfig(**QUICK, epochs=3, save_steps=2)

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
    assert all(f"checkpoint-{step} is incomplete" in passed for step in (4, 6))  # the last two


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
def test_adapters_that_are_not_merged_are_in_the_mode_of_the_model(model, training):
    config = FinetuneConfig(**QUICK, max_steps=1, dropout=0.1, merge=False)
    adapted = lo.convert.finetune(model.train(training), token_rows(1, 40), config).model
    assert {module.training for module in adapted.modules()} == {training}


def test_an_adapter_loads_with_the_model_that_it_is_on(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base, rows = lo.hf.from_pretrained(tmp_path / "base"), token_rows(1, 40)
    config = FinetuneConfig(**QUICK, max_steps=2, merge=False)
    adapted = lo.convert.finetune(base, rows, config).model
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(rows).logits
        assert lo.hf.from_pretrained(tmp_path / "adapter")(rows).logits.equal(expected)
        assert not lo.hf.from_pretrained(tmp_path / "base")(rows).logits.equal(expected)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"adapter .* is on .*base, which is not there"):
        lo.hf.from_pretrained(tmp_path / "adapter")
    said = tmp_path / "adapter" / "adapter_config.json"
    said.write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="does not say which model the adapter is on"):
        lo.hf.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_of_tied_weights_are_not_merged(target):
    rows = tiny_models.token_ids(2, 40)
    config = FinetuneConfig(target_modules=("q_proj", target), max_steps=1)
    tied = lo.hf.convert(tiny_models.tiny(tie_word_embeddings=True), tiny_models.NARROW)
    with pytest.raises(ValueError, match=r"one of model\.embed_tokens, lm_head, whose weights are"):
        lo.convert.finetune(tied, rows, config)
    lo.convert.finetune(tied, rows, config.model_copy(update={"merge": False}))
    apart = lo.hf.convert(tiny_models.tiny(), tiny_models.NARROW)
    lo.convert.finetune(apart, rows, config)


@pytest.mark.parametrize(
    ("writer", "error"),
    [("torch.save", RuntimeError), ("peft.peft_model.safe_save_file", SafetensorError)],
)
def test_a_checkpoint_that_cannot_be_written_is_named_and_deleted(
    writer, error, model, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise error("unexpected pos 24576 vs 24468")

    config = FinetuneConfig(max_steps=2, gradient_accumulation=1)
    monkeypatch.setattr(writer, full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written, with \d+ bytes free"):
        lo.convert.finetune(model, token_rows(2, 40), config, output_dir=tmp_path)
    assert not (tmp_path / "checkpoint-2").exists()


def test_merged_model_computes_what_the_adapters_computed(model):
    rows, config = token_rows(2, 40), FinetuneConfig(max_steps=2, learning_rate=1e-2, merge=False)
    adapted = lo.convert.finetune(model, rows, config).model.eval()
    with torch.no_grad():
        expected = adapted(rows).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(rows).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_loss_that_is_not_finite_ends_finetune_and_changes_nothing(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = FinetuneConfig(learning_rate=1e38, warmup=0, gradient_accumulation=1)
    with pytest.raises(RuntimeError, match=r"the loss of step \d+ is .*1e\+38 may be too large"):
        lo.convert.finetune(model, token_rows(4, 32), config)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_merged_model_can_be_trained_further(model):
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tuned = lo.convert.finetune(
        model, token_rows(1, 40), FinetuneConfig(**QUICK, max_steps=1)
    ).model
    assert {name: p.requires_grad for name, p in tuned.named_parameters()} == before
