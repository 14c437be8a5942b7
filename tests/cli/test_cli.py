"""The command line and the demo, end to end on a tiny model with a tokenizer made on the fly."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.command_line import TEXT, lolcats
from helpers.training import torchrun
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import lolcats_ops as lo
from examples.demo.__main__ import run as run_demo
from examples.demo.settings import DemoConfig
from lolcats_ops import _C
from lolcats_ops.cli import app
from lolcats_ops.convert import ConversionConfig, FinetuneConfig, TransferConfig


def test_two_commands_linearize_a_model(folder):
    options = ("--text", folder / "text.txt", "--config", folder / "lolcats.yaml")
    lolcats("transfer", folder / "model", folder / "stage1", *options)
    assert "parameters" in lolcats("finetune", folder / "stage1", folder / "stage2", *options)
    evaluated = lolcats("eval", folder / "stage2", "--text", folder / "text.txt", "--length", 32)
    assert float(evaluated) > 1
    assert lolcats("generate", folder / "stage2", "the quick", "--max-new-tokens", 4).strip()
    assert "window" in lolcats("info", folder / "stage2")


def test_two_processes_train_as_one_on_twice_the_batch(folder, tmp_path):
    """One of them saves and speaks. The mean loss of a batch is that of its halves' means, but for
    the division by the teacher's variance."""
    text = ("--text", folder / "text.txt")

    def settings(name, batch):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            "lolcats: {window: 8, feature_dim: 16}\n"
            "data: {length: 32}\n"
            f"transfer: {{micro_batch: {batch}, batch_size: {4 * batch}, normalize: false}}\n"
            f"finetune: {{batch_size: {batch}, gradient_accumulation: 1, max_steps: 3}}\n"
        )
        return ("--config", path)

    def together(*arguments):
        result = torchrun("-m", "lolcats_ops.cli", *arguments)
        assert result.stdout.count("saved") == result.stderr.count("tokenizing") == 1
        assert result.stderr.count("left") == 2  # of two bars
        return result.stdout

    def losses(printed):
        return [float(number) for number in re.findall(r"[0-9]+\.[0-9]+", printed.splitlines()[-1])]

    one, two = settings("one", 2), settings("two", 1)
    for command, model, stage in (("transfer", folder / "model", "stage1"),
                                  ("finetune", tmp_path / "one" / "stage1", "stage2")):  # fmt: skip
        out = tmp_path / "two" / stage
        asked = losses(lolcats(command, model, tmp_path / "one" / stage, *text, *one))
        had = losses(together(command, model, out, *text, *two, "--resume"))
        assert len(had) == 2
        assert had == pytest.approx(asked, rel=1e-3)
        expected, got = (
            load_file(tmp_path / name / stage / "model.safetensors") for name in ("one", "two")
        )
        before = load_file(model / "model.safetensors")
        assert not all(x.equal(before.get(name, x + 1)) for name, x in expected.items())
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, rtol=1e-3, atol=1e-5)
        with pytest.raises(ValueError, match="was begun with another number of processes;"):
            lolcats(command, model, out, *text, *two, "--resume")


def test_sampling_repeats_with_a_seed_and_narrows_with_top_p(folder, tmp_path):
    """The tiny model is hardly trained: at this temperature every word is as likely."""

    def said(*options):
        return lolcats("generate", folder / "model", "the quick", "--max-new-tokens", 12, *options)

    hot = ("--temperature", 100)
    assert said(*hot, "--seed", 1) == said(*hot, "--seed", 1) != said(*hot, "--seed", 2)
    assert said(*hot, "--top-p", 0, "--seed", 1) == said()
    beams = tmp_path / "beams"
    shutil.copytree(folder / "model", beams)
    settings = transformers.GenerationConfig(num_beams=3, eos_token_id=0)
    settings.save_pretrained(beams)  # streams have no beams
    assert lolcats("generate", beams, "the quick", "--max-new-tokens", 12) == said()
    for option in (("--seed", 1), ("--top-p", 0.5)):
        with pytest.raises(ValueError, match="give a --temperature"):
            said(*option)


def test_a_converted_model_keeps_the_attention_that_it_has(folder, tmp_path):
    text, config = ("--text", folder / "text.txt"), ("--config", folder / "lolcats.yaml")
    lolcats("convert", folder / "model", tmp_path / "converted", *config)
    (tmp_path / "short.yaml").write_text(
        "lolcats: {window: 8, gate_init: 0.5}\ndata: {length: 32}\n"
    )
    lolcats("transfer", tmp_path / "converted", tmp_path / "stage1", *text, "--config",
            tmp_path / "short.yaml", "--device", "cpu")  # fmt: skip
    saved = lo.convert.ConversionConfig.load(tmp_path / "stage1" / "lolcats.yaml")
    assert (saved.lolcats.window, saved.data.length) == (8, 32)
    (tmp_path / "other.yaml").write_text("lolcats: {window: 16, feature_dim: 16}\n")
    with pytest.raises(ValueError, match="has, which is window=8"):
        lolcats("transfer", tmp_path / "converted", tmp_path / "no", *text, "--config",
                tmp_path / "other.yaml")  # fmt: skip
    with pytest.raises(ValueError, match="model is not converted"):
        lolcats("finetune", folder / "model", tmp_path / "no", *text, *config)
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").touch()
    arguments = map(str, ("finetune", tmp_path / "stage1", tmp_path / "file", *text, *config))
    result = CliRunner().invoke(app, [*arguments])
    assert (result.exit_code, "Invalid value for 'OUT'" in result.output) == (2, True)
    for prompt in ("", "  "):
        with pytest.raises(ValueError, match=f"prompt '{prompt}' has no tokens"):
            lolcats("generate", tmp_path / "stage1", prompt)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_absent_is_named(folder):
    with pytest.raises(ValueError, match="--device cuda"):
        lolcats("generate", folder / "model", "the quick", "--device", "cuda")


def test_info_describes_a_converted_model_in_a_process_of_its_own(folder, tmp_path):
    lolcats("convert", folder / "model", tmp_path, "--config", folder / "lolcats.yaml")
    command = [sys.executable, "-m", "lolcats_ops.cli", "info", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "lolcats" in said
    assert "window" in said


def test_more_tokens_than_a_model_was_made_with_are_noted(folder, tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr("lolcats_ops._cli_models.console", Console(file=said, width=200))
    lolcats("convert", folder / "model", tmp_path, "--config", folder / "lolcats.yaml")
    options = ("--text", folder / "text.txt", "--length")
    lolcats("eval", tmp_path, *options, 32)
    assert not said.getvalue()
    lolcats("eval", tmp_path, *options, 33)
    assert "made with rows of 32 tokens" in said.getvalue()


def test_interrupted_commands_go_on(folder, tmp_path):
    options = ("--text", folder / "text.txt", "--config", folder / "lolcats.yaml", "--resume")
    for _ in range(2):  # the second finds all work done
        lolcats("transfer", folder / "model", tmp_path, *options)
    assert (tmp_path / "transfer.pt").exists()
    lolcats("finetune", tmp_path, tmp_path / "stage2", *options)
    assert "nothing was left" in lolcats("finetune", tmp_path, tmp_path / "stage2", *options)
    last = tmp_path / "stage2" / "checkpoints" / "checkpoint-2"
    (last / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert "loss" in lolcats("finetune", tmp_path, tmp_path / "stage2", *options)
    (folder / "longer.txt").write_text(TEXT + TEXT)
    options = ("--text", folder / "longer.txt", *options[2:])
    with pytest.raises(ValueError, match="begun with another data"):
        lolcats("finetune", tmp_path, tmp_path / "stage2", *options)


def test_convert_saves_a_swapped_model(folder, tmp_path):
    lolcats("convert", folder / "model", tmp_path, "--config", folder / "lolcats.yaml")
    assert lo.hf.attention_layers(lo.hf.from_pretrained(tmp_path))[0].config.window == 8


def test_convert_leaves_no_template_of_another_tokenizer_behind(folder, tmp_path, failure):
    shutil.copytree(folder / "model", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    lolcats("convert", folder / "model", tmp_path, "--config", folder / "lolcats.yaml")
    code, said = failure("generate", tmp_path, "the quick", "--chat")
    assert code == 1
    assert "has no chat template" in said


def test_convert_goes_on_with_the_settings_of_a_model(folder, tmp_path):
    source = shutil.copytree(folder / "model", tmp_path / "model")
    (source / "lolcats.yaml").write_text("lolcats: {window: 8}\ntransfer: {mse: 0.0, xent: 1.0}\n")
    lolcats("convert", source, tmp_path / "out", "--set", "lolcats.sink=2")
    saved = ConversionConfig.load(tmp_path / "out" / "lolcats.yaml")
    assert (saved.lolcats.window, saved.lolcats.sink, saved.transfer.mse) == (8, 2, 0)
    with pytest.raises(ValueError, match="mse and xent are both 0"):
        lolcats("convert", source, tmp_path / "out", "--set", "transfer.xent=0")


def test_an_adapter_does_not_take_the_place_of_its_model(folder, tmp_path, failure):
    (tmp_path / "c.yaml").write_text("finetune: {max_steps: 1, merge: false}")
    source = shutil.copytree(folder / "model", tmp_path / "model")
    options = ("--text", folder / "text.txt", "--config", tmp_path / "c.yaml")
    code, said = failure("finetune", source, source, *options)
    assert code == 1
    assert "OUT gets an adapter on it; give another OUT" in said
    assert (source / "model.safetensors").exists()


def test_a_stage_goes_on_with_the_settings_of_the_one_before(folder, tmp_path):
    text = ("--text", folder / "text.txt")
    config = tmp_path / "c.yaml"
    config.write_text("lolcats: {window: 8, feature_dim: 16}\ndata: {length: 32}\n"
                      "transfer: {batch_size: 3}\nfinetune: {max_steps: 1}\n")  # fmt: skip
    lolcats("transfer", folder / "model", tmp_path / "stage1", *text, "--config", config)
    config.write_text("finetune: {rank: 4, alpha: 4}")
    options = ("--config", config, "--set", "finetune.rank=2")
    lolcats("finetune", tmp_path / "stage1", tmp_path / "stage2", *text, *options)
    saved = ConversionConfig.load(tmp_path / "stage2" / "lolcats.yaml")
    assert (saved.lolcats.window, saved.data.length, saved.transfer.batch_size) == (8, 32, 3)
    assert (saved.finetune.max_steps, saved.finetune.rank, saved.finetune.alpha) == (1, 2, 4)
    with pytest.raises(ValueError, match="than the converted model has, which is window=8"):
        lolcats("transfer", tmp_path / "stage1", tmp_path / "no", *text,
                "--set", "lolcats.window=16")  # fmt: skip


def test_version_is_printed():
    assert lolcats("--version").strip() == lo.__version__


def test_default_configuration_is_printed_as_yaml():
    printed = lolcats("info", "--config")
    assert printed.startswith("lolcats:\n  window: 64\n")
    assert "\n  target_modules: null\n" in printed


@pytest.mark.skipif(_C.has_cuda(), reason="this build has the kernels")
def test_info_says_how_to_get_the_cuda_kernels():
    said = lolcats("info")
    assert "lolcats_ops.cupy.install_launcher()" in said
    assert "LOLCATS_CUDA=ON" in said


def test_info_is_about_the_installation_wherever_it_runs(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "instruction set" in lolcats("info")


def test_help_needs_no_torch_and_shows_examples(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lolcats_ops.hf", None)
    assert "Exit codes" in lolcats("--help")
    assert "Example" in lolcats("transfer", "--help")


def test_demo_writes_its_report_and_pictures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    run_demo(
        DemoConfig(
            out=tmp_path,
            model=str(folder / "model"),
            texts=(folder / "text.txt",),
            prompt="the quick",
            new_tokens=2,
            lolcats=lo.hf.LolcatsConfig(window=8, feature_dim=16),
            length=64,
            held_out=2,
            transfer_sequences=4,
            transfer=TransferConfig(batch_size=4),
            finetune_length=32,
            finetune=FinetuneConfig(max_steps=2, gradient_accumulation=1),
            contexts=(32, 64, 128),
            decode_tokens=2,
            peak_lengths=(64, 256),
            peak_layers=1,
        )
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["perplexity"].keys() == {
        "softmax",
        "swapped",
        "stage1",
        "stage2",
        "softmax_lora",
    }
    assert len(set(report["cache_bytes"]["hybrid"].values())) == 1
    assert report["cache_bytes"]["softmax"]["128"] == 4 * report["cache_bytes"]["softmax"]["32"]
    assert report["prefill_s"]["hybrid"].keys() == {"64", "128"}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model",
        "report.json",
        "report.md",
        "perplexity.png",
        "losses.png",
        "context.png",
    }
    assert lo.hf.from_pretrained(tmp_path / "model").config.lolcats["window"] == 8
