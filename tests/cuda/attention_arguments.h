// The arguments of hybrid_attention and linear_attention.
#pragma once
#include "launch.h"

template <class Args>
Args arguments_of(const emulator::Arguments& a) {
  Args args = {};
  args.q = tensor_of(a, "q");
  args.k = tensor_of(a, "k");
  args.v = tensor_of(a, "v");
  args.o = tensor_of(a, "o");
  args.den = tensor_of(a, "den");
  args.feature_q = features_of(a, "q");
  args.feature_k = features_of(a, "k");
  args.scale = a.number<double>("scale");
  args.cu_seqlens = tensor_of(a, "cu_seqlens");
  args.key_padding_mask = tensor_of(a, "key_padding_mask");
  return args;
}

inline lol_linear_attention_args linear_arguments(const emulator::Arguments& a) {
  auto args = arguments_of<lol_linear_attention_args>(a);
  args.normalize = a.number<int>("normalize");
  args.eps = a.number<double>("den_eps");
  args.kv0 = tensor_of(a, "kv0");
  args.ksum0 = tensor_of(a, "ksum0");
  args.kv = tensor_of(a, "kv");
  args.ksum = tensor_of(a, "ksum");
  return args;
}

inline lol_hybrid_attention_args hybrid_arguments(const emulator::Arguments& a) {
  auto args = arguments_of<lol_hybrid_attention_args>(a);
  args.gate = tensor_of(a, "gate");
  args.window = a.number<int64_t>("window");
  args.window_kind = a.number<int>("window_kind");
  args.sink = a.number<int64_t>("sink");
  args.affine = a.number<int>("affine");
  args.m = tensor_of(a, "m");
  return args;
}
