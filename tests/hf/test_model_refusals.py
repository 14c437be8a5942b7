"""What cannot be converted is refused by name and reason."""

import pytest
import torch
import transformers
from helpers.tiny_models import NARROW, SHAPE, VOCABULARY, WIDE, generate, tiny, token_ids

import lolcats_ops as lo

REFUSED = {
    "Phi": (transformers.PhiConfig, "o_proj"),
    "Gemma2": (transformers.Gemma2Config, "attn_logit_softcapping"),
    "GptOss": (transformers.GptOssConfig, "sink"),
}


def test_layers_that_attend_within_chunks_are_refused():
    config = transformers.Llama4TextConfig(
        **SHAPE,
        attention_chunk_size=16,
        num_local_experts=2,
        intermediate_size_mlp=64,
        layer_types=["chunked_attention"] * 2,
    )
    with pytest.raises(ValueError, match="layers of type chunked_attention do not attend all"):
        lo.hf.convert(transformers.AutoModelForCausalLM.from_config(config), NARROW)


def test_layers_that_choose_what_they_attend_are_refused():
    config = transformers.MiniMaxM3VLTextConfig(
        **SHAPE,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "dense"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="layers of type minimax_m3_sparse do not attend all"):
        lo.hf.convert(model, NARROW)
    lo.hf.convert(model, lo.hf.LolcatsConfig(window=8, softmax_layers=(1,)))


def test_layers_that_share_keys_are_refused():
    config = transformers.Gemma3nTextConfig(
        **{**SHAPE, "num_hidden_layers": 4}, vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=2, layer_types=["full_attention"] * 4, hidden_size_per_layer_input=8,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3\] share cached keys and values"):
        lo.hf.convert(model, NARROW)
    lo.hf.convert(model, lo.hf.LolcatsConfig(window=8, feature_dim=16, softmax_layers=(1, 2, 3)))
    ids = token_ids(1, 12)
    assert torch.equal(generate(model, ids, 8), generate(model, ids, 8, use_cache=False))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"is_causal": False}, "not causal"), ({"head_dim": 512}, "head_dim=512.* 256, not 512$")],
)
def test_models_that_no_kernel_could_run_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        lo.hf.convert(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)))


class Packed(torch.nn.Module):
    """A projection that keeps its weight as quantized models do."""

    def __init__(self, linear, keep):
        super().__init__()
        self.in_features, self.linear = linear.in_features, [linear]
        if keep:
            self.register_buffer("qweight", linear.weight.detach())

    def forward(self, x):
        return self.linear[0](x)


def test_projections_that_have_no_tensor_or_size_are_refused(prompt):
    model = tiny()
    attention = model.model.layers[1].self_attn
    projection = attention.o_proj
    for other in (Packed(projection, keep=False), torch.nn.Sequential(projection)):
        attention.o_proj, config = other, model.config
        with pytest.raises(ValueError, match=f"o_proj, a .*{type(other).__name__}, lacks in_feat"):
            lo.hf.convert(model, NARROW)
        assert model.config is config
    attention.o_proj = Packed(projection, keep=True)
    expected = model(prompt).logits
    got = lo.hf.convert(model, WIDE)(prompt).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class OwnAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return self.o_proj(self.v_proj(hidden_states).repeat(1, 1, 2)), None


class SaysNothing(transformers.LlamaForCausalLM):
    _supports_attention_backend = False


def test_attention_that_is_not_dispatched_is_refused_whatever_the_model_says_of_itself(prompt):
    model = SaysNothing(transformers.LlamaConfig(**SHAPE)).eval()
    want = model(prompt).logits
    torch.testing.assert_close(lo.hf.convert(model, WIDE)(prompt).logits, want)
    lo.hf.restore(model)
    model.model.layers[1].self_attn.__class__ = OwnAttention
    with pytest.raises(ValueError, match="is not dispatched through transformers' AttentionInterf"):
        lo.hf.convert(model, WIDE)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_model_is_refused_by_name(name):
    config, reason = REFUSED[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE))
    with pytest.raises(ValueError, match=f"{name}ForCausalLM cannot be converted: .*{reason}"):
        lo.hf.convert(model, NARROW)
    assert not lo.hf.attention_layers(model)
    assert not hasattr(model.config, "lolcats")


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration .* is an encoder-decoder"):
        lo.hf.convert(transformers.T5ForConditionalGeneration(config))


def test_misuse_is_refused(model):
    with pytest.raises(ValueError, match="converted already"):
        lo.hf.convert(model)
    with pytest.raises(ValueError, match="not converted"):
        lo.hf.restore(tiny())
    with pytest.raises(ValueError, match=r"softmax_layers names \[7\]"):
        lo.hf.convert(tiny(), lo.hf.LolcatsConfig(softmax_layers=(7,)))
    with pytest.raises(ValueError, match="mode is 'none'"):
        lo.hf.set_mode(model, "none")
    with pytest.raises(TypeError, match="PreTrainedModel"):
        lo.hf.convert(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config is a dict"):
        lo.hf.convert(tiny(), {"window": 8})
