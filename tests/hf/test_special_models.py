"""Models with something of their own beside the attention that is converted."""

import json

import peft
import pytest
import torch
import transformers
from helpers.tiny_models import NARROW, SHAPE, WIDE, token_ids
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextModel
from transformers.models.inkling.configuration_inkling import InklingTextConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import lolcats_ops as lo

MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def decoded(model, ids, mask=None, split=17):
    """The logits of the last tokens, one after the other, on a cache of those before."""

    def part(begin, end, cache):
        seen = None if mask is None else mask[:, :end]
        return model(ids[:, begin:end], attention_mask=seen, past_key_values=cache, use_cache=True)

    first = part(0, split, None)
    steps = [part(i, i + 1, first.past_key_values).logits for i in range(split, ids.shape[1])]
    return torch.cat(steps, 1)


@torch.no_grad()
@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["full_attention", "sliding_attention"]])
def test_values_may_be_narrower_than_keys_and_sinks_are_of_layers_that_stay(kinds):
    config = transformers.MiMoV2FlashConfig(**SHAPE, **MIXTURE, v_head_dim=8, layer_types=kinds)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = token_ids(2, 20)
    want = model(ids).logits
    lo.hf.convert(model, WIDE)
    assert len(lo.hf.attention_layers(model)) == kinds.count("full_attention")
    close(model(ids).logits, want)
    lo.hf.restore(model)
    lo.hf.convert(model, NARROW)
    close(decoded(model, ids), model(ids).logits[:, 17:])


RECURRENT = {
    "jamba": transformers.JambaConfig(
        **SHAPE, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, num_experts=4, use_mamba_kernels=False, mamba_dt_rank=4,
    ),
    "olmo_hybrid": transformers.OlmoHybridConfig(
        **SHAPE, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "qwen3_5": transformers.Qwen3_5TextConfig(
        **SHAPE, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", RECURRENT)
def test_attention_beside_other_recurrent_layers_is_converted(family, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(RECURRENT[family]).eval()
    ids, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    want = model(ids, attention_mask=mask).logits
    lo.hf.convert(model, WIDE)
    assert len(lo.hf.attention_layers(model)) == 1
    close(model(ids, attention_mask=mask).logits[mask.bool()], want[mask.bool()])
    lo.hf.restore(model)
    with pytest.raises(
        ValueError, match=r"softmax_layers names \[0\], but it attends in its layers"
    ):
        lo.hf.convert(model, lo.hf.LolcatsConfig(softmax_layers=(0,)))
    lo.hf.convert(model, NARROW)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    close(decoded(model, ids, mask), whole[:, 17:])
    caches = [model(ids[:, :n], use_cache=True).past_key_values for n in (10, 20)]
    assert lo.hf.cache_bytes(caches[0]) == lo.hf.cache_bytes(caches[1]) > 0
    model.save_pretrained(tmp_path)
    assert lo.hf.from_pretrained(tmp_path)(ids, attention_mask=mask).logits.equal(whole)


@torch.no_grad()
def test_layers_with_a_cache_of_their_own_see_the_mask_of_a_padded_batch():
    config = transformers.MiniMaxM3VLTextConfig(
        **SHAPE,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    lo.hf.convert(model, lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(1,)))
    ids, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    close(decoded(model, ids, mask), whole[:, 17:])


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 3, 4])
def test_positions_of_pictures_are_no_packed_sequences(rows):
    """[3 | 4, B, T]: the last three are time, height and width, a fourth one before them text."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = transformers.Glm4vMoeTextConfig(
        **SHAPE, **MIXTURE, rope_parameters={**rope, "partial_rotary_factor": 1.0}
    )
    model = Glm4vMoeTextModel(config).eval()
    ids, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    positions = None if rows is None else torch.arange(20).expand(rows, 2, 20).clone()
    if rows is not None:
        positions[-3:, :, 4:12] = 4  # a picture
    inputs = {"attention_mask": mask, "position_ids": positions}
    want = model(ids, **inputs).last_hidden_state[mask.bool()]
    with pytest.warns(UserWarning, match="has no language model head"):
        lo.hf.convert(model, WIDE)
    close(model(ids, **inputs).last_hidden_state[mask.bool()], want)


@torch.no_grad()
def test_a_cache_may_have_layers_of_cross_attention_among_states():
    config = MllamaTextConfig(**{**SHAPE, "num_hidden_layers": 3}, cross_attention_layers=[1])
    model = transformers.MllamaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="a family that AutoModelForCausalLM does not load"):
        lo.hf.convert(model, NARROW)
    ids = token_ids(2, 20)
    close(decoded(model, ids), model(ids).logits[:, 17:])


def test_a_family_without_a_class_to_load_is_named(tmp_path):
    model = transformers.Emu3ForCausalLM(Emu3TextConfig(**SHAPE))
    with pytest.warns(UserWarning, match="a family that AutoModelForCausalLM does not load"):
        lo.hf.convert(model, NARROW)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a Emu3ForCausalLM; only causal language models"):
        lo.hf.from_pretrained(tmp_path)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "myllama"

class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_a_family_whose_code_came_with_the_model_is_warned_of(tmp_path):
    hub = tmp_path / "hub"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(hub)
    (hub / "modeling_my.py").write_text(REMOTE)
    code = {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
    said = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(said | {"model_type": "myllama", "auto_map": code}))
    model = transformers.AutoModelForCausalLM.from_pretrained(hub, trust_remote_code=True)
    with pytest.warns(UserWarning, match="a family whose code came with it"):
        lo.hf.convert(model, NARROW)
    model.save_pretrained(tmp_path / "converted")
    assert not (tmp_path / "converted" / "auto.py").exists()
    with pytest.raises(ValueError, match="or the family's code came with the model"):
        lo.hf.from_pretrained(tmp_path / "converted")


def test_a_model_that_would_save_an_adapter_alone_is_warned_of(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(
        tmp_path / "it"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "lora")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    with pytest.warns(UserWarning, match="holds an adapter .* all that save_pretrained writes"):
        lo.hf.convert(model, NARROW)


def test_a_bias_of_positions_is_refused():
    kinds = ["hybrid_sliding"] * 2
    config = InklingTextConfig(**SHAPE, **MIXTURE, layer_types=kinds)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="its layers of type hybrid_sliding"):
        lo.hf.convert(model, NARROW)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    attention = lo.hf.attention_layers(lo.hf.convert(model, NARROW))[0]
    with pytest.raises(NotImplementedError, match="no position_bias"):
        attention.refuse({"position_bias": torch.zeros(1)})
