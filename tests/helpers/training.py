"""A tiny random model to train, rows of tokens, and two processes that train together."""

import os
import subprocess
import sys

import torch
import transformers

import lolcats_ops as lo

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


def torchrun(*arguments):
    """Two processes of `torchrun ARGUMENTS`, on the CPU: they would share a GPU."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    result = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result
