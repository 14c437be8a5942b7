"""A model that commands are given, and commands that fail."""

import pytest
import torch
import transformers
from helpers.command_line import TEXT
from helpers.tiny_models import word_tokenizer

from lolcats_ops.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a softmax model, a text and a configuration."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = word_tokenizer(TEXT)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "lolcats.yaml").write_text(
        "lolcats: {window: 8, feature_dim: 16}\n"
        "data: {length: 32}\n"
        "finetune: {max_steps: 2, gradient_accumulation: 1}\n"
    )
    return folder


@pytest.fixture
def failure(monkeypatch, capsys):
    """Runs a command that fails; returns its exit code and what it said on stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["lolcats", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr().err

    return run
