"""Stage 1, on tiny random models."""

import warnings

import pytest
import torch
import transformers
from helpers.training import NARROW, tiny, token_rows

import lolcats_ops as lo
from lolcats_ops.convert import TransferConfig


def test_transfer_lowers_the_loss_of_every_layer(model):
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lolcats" not in n}
    config = TransferConfig(batch_size=4, rounds=4, epochs=4)
    report = lo.convert.transfer(model, token_rows(8, 64), config)
    assert [len(layer) for layer in report.losses] == [8 * 4 * 4] * 2
    for layer in report.losses:
        assert sum(layer[-8:]) < 0.9 * sum(layer[:8])
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)
    assert {layer.mode for layer in lo.hf.attention_layers(model)} == {"hybrid"}


def test_a_single_step_of_transfer_moves_the_features(model):
    layer = lo.hf.attention_layers(model)[0]
    before = layer.feature_q.detach().clone()
    lo.convert.transfer(model, token_rows(1, 16), TransferConfig(learning_rate=1e-2))
    assert (layer.feature_q - before).abs().max() > 1e-4


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


def test_gradients_of_before_are_no_part_of_the_first_step():
    rows, model = token_rows(2, 40), tiny()
    lo.hf.convert(model, NARROW)
    model(rows, labels=rows).loss.backward()
    other = lo.hf.convert(tiny(), NARROW)
    losses = [lo.convert.transfer(each, rows).losses for each in (model, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("length", "learns"), [(9, False), (10, True)])
def test_rows_that_leave_nothing_to_the_features_are_warned_of(length, learns):
    """NARROW has a window of 8 and a sink."""
    model, before = lo.hf.convert(tiny(), NARROW), lo.hf.convert(tiny(), NARROW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lo.convert.transfer(model, token_rows(2, length))
    said = [str(each.message) for each in caught if "nothing is learned" in str(each.message)]
    assert len(said) == (0 if learns else 1)
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved) == learns


def test_an_unconverted_model_has_nothing_to_transfer():
    with pytest.raises(ValueError, match="not converted"):
        lo.convert.transfer(tiny(), token_rows(1, 8))


def test_a_layer_without_values_keeps_finite_features(model):
    """A pruned one: its teacher is 0, and has no variance to be normalized by."""
    torch.nn.init.zeros_(model.model.layers[0].self_attn.v_proj.weight)
    lo.convert.transfer(model, token_rows(2, 32))
    assert all(p.isfinite().all() for p in model.parameters())


def first_loss(**options):
    """Loss of the first step, and what the optimizer made of it, of a fresh model's first layer."""
    model = lo.hf.convert(tiny(), NARROW)
    rows = token_rows(2, 40)
    report = lo.convert.transfer(
        model, rows, TransferConfig(batch_size=2, micro_batch=2, **options)
    )
    return report.losses[0][0], lo.hf.attention_layers(model)[0].feature_q.detach()


def test_a_loss_that_is_not_finite_ends_transfer_before_it_changes_the_layer(model):
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.inf
    layer = lo.hf.attention_layers(model)[1]
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    with pytest.raises(RuntimeError, match="loss of converted layer 1 is nan in step 1: "):
        lo.convert.transfer(model, token_rows(2, 24))
    assert all(torch.equal(before[n], p) for n, p in layer.named_parameters())


def test_the_loss_is_divided_by_the_variance_of_the_teacher_if_it_is_asked_to():
    model, seen = lo.hf.convert(tiny(), NARROW), []
    layer = lo.hf.attention_layers(model)[0]
    layer.mode, layer.learner = (
        "transfer",
        lambda attend, n: seen.append(attend(slice(0, n))) or seen[0].teacher,
    )
    with torch.no_grad():
        model.model(token_rows(2, 40), use_cache=False)
    mse, variance = seen[0].mse.item(), seen[0].teacher.var().item()
    assert first_loss()[0] == pytest.approx(mse / variance, rel=1e-4)
    assert first_loss(normalize=False)[0] == pytest.approx(mse, rel=1e-4)


@pytest.mark.parametrize("name", ["mse", "xent"])
def test_losses_are_weighted(name):
    other = {"mse": "xent", "xent": "mse"}[name]

    def learned(weight):
        return first_loss(**{name: weight, other: 1.0}, rounds=8)[1]

    none, little, all_of_it = map(learned, (0.0, 1e-9, 1.0))
    torch.testing.assert_close(little, none, rtol=0, atol=1e-3)
    assert (all_of_it - none).abs().max() > 1e-2


def test_the_seed_shuffles():
    def last(seed):
        model = lo.hf.convert(tiny(), NARROW)
        config = TransferConfig(batch_size=1, seed=seed)
        return lo.convert.transfer(model, token_rows(8, 40), config).losses[0]

    assert last(0) == last(0)
    assert last(0) != last(1)


def test_a_model_that_applies_a_layer_twice_is_refused(model):
    """A learner has one step for each of its batches."""
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(NotImplementedError, match="applies a layer several times"):
        lo.convert.transfer(model, token_rows(1, 16))
    assert all(layer.learner is None for layer in lo.hf.attention_layers(model))


def test_every_epoch_has_an_order_of_its_own(model):
    rows, seen = token_rows(8, 16), []
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lo.convert.transfer(model, rows, TransferConfig(batch_size=1, epochs=2))
    first, second = torch.cat(seen[:8]), torch.cat(seen[8:])
    assert not first.equal(second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(rows.tolist())
