"""Hugging Face models: convert in place, generate with a constant-size cache, save and load."""

from lolcats_ops.hf.attention import LolcatsAttention
from lolcats_ops.hf.auto import convert, from_pretrained, restore
from lolcats_ops.hf.cache import LolcatsCache, LolcatsCacheLayer, cache_bytes
from lolcats_ops.hf.config import LolcatsConfig
from lolcats_ops.hf.patch import attention_layers, set_mode, use_mode

__all__ = [
    "LolcatsAttention",
    "LolcatsCache",
    "LolcatsCacheLayer",
    "LolcatsConfig",
    "attention_layers",
    "cache_bytes",
    "convert",
    "from_pretrained",
    "restore",
    "set_mode",
    "use_mode",
]
