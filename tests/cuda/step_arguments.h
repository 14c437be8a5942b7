// The arguments of hybrid_attention_step_, but for q, k, v and o.
#pragma once
#include "launch.h"

inline lol_hybrid_attention_step_args step_arguments(const emulator::Arguments& a) {
  lol_hybrid_attention_step_args args = {};
  args.feature_q = features_of(a, "q");
  args.feature_k = features_of(a, "k");
  args.gate = tensor_of(a, "gate");
  args.window = a.number<int64_t>("window");
  args.window_kind = a.number<int>("window_kind");
  args.scale = a.number<double>("scale");
  args.affine = a.number<int>("affine");
  args.lazy = a.number<int64_t>("lazy");
  args.state = {tensor_of(a, "kv"),     tensor_of(a, "ksum"),   tensor_of(a, "k_ring"),
                tensor_of(a, "v_ring"), tensor_of(a, "k_sink"), tensor_of(a, "v_sink"),
                tensor_of(a, "length"), tensor_of(a, "folded")};
  args.state_indices = tensor_of(a, "state_indices");
  args.cu_seqlens = tensor_of(a, "cu_seqlens");
  args.key_padding_mask = tensor_of(a, "key_padding_mask");
  return args;
}

// Tokens [begin, end) of a sequence tensor.
inline lol_tensor tokens(lol_tensor t, int64_t begin, int64_t end) {
  t.data = static_cast<char*>(t.data) + begin * t.stride[2] * (t.dtype == LOL_F32 ? 4 : 2);
  t.shape[2] = end - begin;
  return t;
}
