"""What processes that torchrun starts have in common, and what they refuse."""

from pathlib import Path

from helpers.training import torchrun

TESTS = Path(__file__).parents[1]

SCRIPT = """
import os

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

import lolcats_ops as lo
from lolcats_ops.convert.processes import mean_gradients
from helpers.training import tiny, token_rows

rank = int(os.environ["RANK"])


def refused(data):
    for stage in (lo.convert.transfer, lo.convert.finetune):
        try:
            stage(model, data)
        except (RuntimeError, ValueError) as error:
            yield str(error)


model = tiny()
torch.manual_seed(rank)
lo.hf.convert(model, lo.hf.LolcatsConfig(8, feature_dim=16, activation="favor", init="orthogonal"))
assert not torch.distributed.is_initialized()
Accelerator()  # without a GPU it is alone
alone = list(refused(token_rows(3, 40)))
assert ["of 2 processes" in error for error in alone] == [True, True], alone
AcceleratorState._reset_state(reset_partial_state=True)

different = list(refused(token_rows(3 + rank, 40)))
assert ["have different data;" in error for error in different] == [True, True], different

report = lo.convert.transfer(model, token_rows(3, 40))
assert len(report.losses[0]) == 2
sums = [float(x.sum()) for layer in lo.hf.attention_layers(model) for x in
        (layer.feature_q, layer.feature_k, layer.gate)]
one, other = gather_object([[*sums, *report.losses]])
assert one == other

weight = torch.nn.Parameter(torch.zeros(3))
weight.grad = torch.full((3,), float(rank))
loss = mean_gradients([weight], torch.tensor(float(rank)), 2)
assert (weight.grad.tolist(), loss.item()) == ([0.5] * 3, 0.5)
torch.distributed.destroy_process_group()
"""


def test_processes_begin_and_end_with_the_same(tmp_path):
    """Feature maps that are drawn at random, and never trained, are the first process's in all."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{SCRIPT}")
    torchrun(script)
