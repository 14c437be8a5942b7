"""Tiny random models of Hugging Face families, and calls of them."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lolcats_ops as lo

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,  # large enough that greedy choices are no ties
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "arcee": transformers.ArceeConfig,
    "cohere": transformers.CohereConfig,
    "cohere2": transformers.Cohere2Config,
    "ernie4_5": transformers.Ernie4_5Config,
    "exaone4": transformers.Exaone4Config,
    "gemma": transformers.GemmaConfig,
    "gemma3": transformers.Gemma3TextConfig,
    "glm4": transformers.Glm4Config,
    "glm4_moe": transformers.Glm4MoeConfig,
    "granite": transformers.GraniteConfig,
    "granitemoe": transformers.GraniteMoeConfig,
    "helium": transformers.HeliumConfig,
    "hunyuan": transformers.HunYuanDenseV1Config,
    "llama": transformers.LlamaConfig,
    "ministral": transformers.MinistralConfig,
    "ministral3": transformers.Ministral3Config,
    "mistral": transformers.MistralConfig,
    "mixtral": transformers.MixtralConfig,
    "nemotron": transformers.NemotronConfig,
    "olmo": transformers.OlmoConfig,
    "olmo2": transformers.Olmo2Config,
    "olmo3": transformers.Olmo3Config,
    "olmoe": transformers.OlmoeConfig,
    "phi3": transformers.Phi3Config,
    "phimoe": transformers.PhimoeConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "seed_oss": transformers.SeedOssConfig,
    "smollm3": transformers.SmolLM3Config,
    "stablelm": transformers.StableLmConfig,
    "starcoder2": transformers.Starcoder2Config,
}
NARROW = lo.hf.LolcatsConfig(window=8, sink=1, feature_dim=16)
WIDE = lo.hf.LolcatsConfig(window=64, feature_dim=16)


def tiny(family="llama", **changes):
    torch.manual_seed(0)
    config = FAMILIES[family](**SHAPE, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def word_tokenizer(text):
    """A tokenizer of a text's words, <eos> being 0."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *sorted({*text.split()})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
    )


def token_ids(*shape, seed=0):
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def generate(model, prompt, tokens=64, **options):
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=tokens, do_sample=False, **options)
