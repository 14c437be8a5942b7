"""From a pretrained softmax model to a linearized one: attention transfer, LoRA, perplexity."""

from lolcats_ops.convert.config import ConversionConfig, DataConfig, FinetuneConfig, TransferConfig
from lolcats_ops.convert.data import pack, read_texts
from lolcats_ops.convert.evaluate import evaluate
from lolcats_ops.convert.finetune import FinetuneReport, finetune
from lolcats_ops.convert.transfer import TransferReport, transfer

__all__ = [
    "ConversionConfig",
    "DataConfig",
    "FinetuneConfig",
    "FinetuneReport",
    "TransferConfig",
    "TransferReport",
    "evaluate",
    "finetune",
    "pack",
    "read_texts",
    "transfer",
]
