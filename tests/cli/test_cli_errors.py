"""What commands say when they fail, and what they leave behind."""

import os
import shutil
import signal
import time
from pathlib import Path

import jinja2
import peft
import pytest
import transformers
from helpers.command_line import TEXT, lolcats
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lolcats_ops as lo
from lolcats_ops.convert.files import replacing, replacing_files


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["eval", "nowhere/at/all", "--text", __file__], 1, "nowhere/at/all: no such folder"),
        (["info", "nowhere/at/all"], 1, "nowhere/at/all: no such folder"),
        (["generate", __file__, "hi"], 1, "is a file; MODEL is a folder"),
        (["info", "model", "--config"], 2, "of no MODEL"),
        (["eval", "model"], 2, "--text"),
        (["transfer", "a", "b", "--text", "no/such/file"], 2, "no/such/file"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(arguments, code, message, failure):
    said = failure(*arguments)
    assert said[0] == code
    assert message in said[1]
    assert "Traceback" not in said[1]


@pytest.mark.parametrize("error", [SafetensorError("no room"), jinja2.TemplateError("no room")])
def test_errors_of_who_reads_the_users_files_are_one_line(error, failure, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr("lolcats_ops.cli.app", fail)
    assert failure() == (1, "lolcats: no room\n")


def test_what_cannot_be_written_to_is_found_before_anything_is_trained(
    folder, failure, monkeypatch
):
    monkeypatch.setattr(lo.convert, "transfer", pytest.fail)
    options = ("--text", folder / "text.txt", "--config", folder / "lolcats.yaml")
    code, said = failure("transfer", folder / "model", "/proc/self", *options)
    assert code == 1
    assert "/proc/self" in said


def test_a_disk_without_room_for_the_model_is_found_before_training(folder, failure, monkeypatch):
    monkeypatch.setattr(lo.convert, "transfer", pytest.fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9000, 8000, 1000))
    options = ("--text", folder / "text.txt", "--config", folder / "lolcats.yaml")
    code, said = failure("transfer", folder / "model", folder / "out", *options)
    assert code == 1
    assert "1000 bytes are free there, and the model has" in said


@pytest.mark.parametrize(
    ("name", "content"), [("vocab.txt", "mine"), ("config.json", '{"theme": "dark"}')]
)
def test_a_folder_of_something_else_keeps_its_files(folder, failure, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    code, said = failure("convert", folder / "model", tmp_path)
    assert code == 1
    assert f"{name} is of no model" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_a_model_without_a_tokenizer_is_named(folder, failure, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "model" / name, tmp_path)
    code, said = failure("generate", tmp_path, "the quick")
    assert code == 1
    assert f"{tmp_path} has no tokenizer" in said


def test_a_job_that_is_told_to_end_leaves_no_half_of_a_model(failure, monkeypatch, tmp_path):
    def save():
        with replacing_files(tmp_path), replacing(tmp_path / "transfer.pt"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setattr("lolcats_ops.cli.app", save)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert failure() == (143, "")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_of_a_model_that_was_cut_short_is_named(name, folder, tmp_path, failure):
    broken = shutil.copytree(folder / "model", tmp_path / "model") / name
    broken.write_bytes(broken.read_bytes()[:100])
    code, said = failure("eval", tmp_path / "model", "--text", folder / "text.txt")
    last = said.splitlines()[-1]  # after a progress bar of transformers
    assert code == 1
    assert last.startswith("lolcats: ")
    assert str(broken) in last


def test_a_configuration_that_is_wrong_is_named_in_one_line(folder, tmp_path, failure):
    for content in ("transfer: {epoch: 1, mse: -1}", "transfer: ["):
        (tmp_path / "c.yaml").write_text(content)
        options = ("--text", folder / "text.txt", "--config", tmp_path / "c.yaml")
        code, said = failure("transfer", folder / "model", tmp_path / "out", *options)
        assert (code, said.count("\n")) == (1, 1)
        assert str(tmp_path / "c.yaml") in said


def test_a_checkpoint_that_was_cut_short_is_named(folder, tmp_path, failure):
    (tmp_path / "transfer.pt").touch()
    options = ("--text", folder / "text.txt", "--config", folder / "lolcats.yaml", "--resume")
    code, said = failure("transfer", folder / "model", tmp_path, *options)
    assert code == 1
    assert f"{tmp_path / 'transfer.pt'} is no whole checkpoint" in said.splitlines()[-1]


def test_a_model_that_cannot_be_written_leaves_the_one_before(folder, tmp_path, monkeypatch):
    out, config = tmp_path / "out", folder / "lolcats.yaml"
    lolcats("convert", folder / "model", out, "--config", config)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args, **kwargs):
        raise SafetensorError("no space left")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    (tmp_path / "other.yaml").write_text("lolcats: {window: 16, feature_dim: 8}")
    with pytest.raises(OSError, match="no space left"):
        lolcats("convert", folder / "model", out, "--config", tmp_path / "other.yaml")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_model_takes_the_place_of_one_of_another_kind(folder, tmp_path):
    """Its tokenizer has a folder of templates, and an adapter has no weights of a model."""
    source = shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    text, config = ("--text", folder / "text.txt"), folder / "lolcats.yaml"
    (tmp_path / "adapter.yaml").write_text(
        "data: {length: 32}\nfinetune: {max_steps: 1, merge: false}\n"
    )
    lolcats("convert", source, tmp_path / "converted", "--config", config)
    for settings in (config, tmp_path / "adapter.yaml", config):
        lolcats("finetune", tmp_path / "converted", tmp_path / "out", *text, "--config", settings)
        assert float(lolcats("eval", tmp_path / "out", *text, "--length", 32)) > 1


def test_a_model_that_lacks_weights_is_refused(folder, tmp_path, failure):
    broken = shutil.copytree(folder / "model", tmp_path / "model") / "model.safetensors"
    weights = load_file(broken)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, broken, metadata={"format": "pt"})
    code, said = failure("eval", tmp_path / "model", "--text", folder / "text.txt")
    assert code == 1
    assert "lacks weights that the model has, 1 in all: model.layers.0.mlp.down_proj" in said


@pytest.mark.parametrize("device", ["tpuu", "5", "xpu"])
def test_a_device_that_is_not_there_is_named(device, folder, failure):
    options = ("--text", folder / "text.txt", "--device", device)
    code, said = failure("eval", folder / "model", *options)
    assert code == 1
    assert said.splitlines()[-1].startswith(f"lolcats: --device {device}: this PyTorch finds no")


def test_an_adapter_is_not_converted_in_the_place_of_its_model(folder, tmp_path, failure):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    shutil.copy(folder / "model" / "tokenizer.json", tmp_path / "adapter")
    shutil.copy(folder / "model" / "tokenizer_config.json", tmp_path / "adapter")
    text = ("--text", folder / "text.txt")
    for command, options in (("convert", ()), ("transfer", text), ("finetune", text)):
        code, said = failure(command, tmp_path / "adapter", tmp_path / "out", *options)
        assert code == 1
        assert f"{tmp_path / 'adapter'} is an adapter (PEFT) on {folder / 'model'}; merge" in said
    assert not (tmp_path / "out").exists()
    assert str(folder / "model") in lolcats("info", tmp_path / "adapter").replace("\n", "")


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    model.resize_token_embeddings(5)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path)
    for arguments in (
        ("eval", tmp_path, "--text", folder / "text.txt", "--length", 32),
        ("generate", tmp_path, TEXT),
    ):
        with pytest.raises(ValueError, match="to 13, the model's vocabulary 5"):
            lolcats(*arguments)


def test_a_saved_model_replaces_another_and_its_config_comes_last(monkeypatch, tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for old in ("adapter_config.json", "notes.txt", "additional_chat_templates/a.jinja"):
        (tmp_path / old).write_text("{}")
    order, replace = [], os.replace

    def noted(new, old):
        order.append(Path(old).name)
        replace(new, old)

    monkeypatch.setattr("os.replace", noted)
    new_files = ["config.json", "model.safetensors", "tokenizer.json"]
    with replacing_files(tmp_path) as new:
        for name in new_files:
            (new / name).write_text("{}")
    assert order[-1] == "config.json"
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted([*new_files, "notes.txt"])
