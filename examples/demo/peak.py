"""`python -m examples.demo.peak MODEL T LAYERS`: peak bytes of stage 1 above the model.

Prints nothing where /proc does not tell. A process of its own, because memory that earlier work
freed would hide it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers

import lolcats_ops as lo
from lolcats_ops.convert.progress import console


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(path: str, tokens: int, layers: int) -> None:
    console.quiet = True
    transformers.utils.logging.disable_progress_bar()
    model = lo.hf.from_pretrained(path)
    model.base_model.layers = model.base_model.layers[:layers]
    rows = torch.randint(
        model.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0)
    )
    # What runs once: thread pools. Rows so short teach nothing, as a warning would say.
    warnings.filterwarnings("ignore", message="transfer: rows of")
    lo.convert.transfer(model, rows[:1, :64], lo.convert.TransferConfig(batch_size=1))
    if not Path("/proc/self/clear_refs").exists():
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    before = _status("VmRSS")
    lo.convert.transfer(model, rows[1:], lo.convert.TransferConfig(batch_size=1))
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
