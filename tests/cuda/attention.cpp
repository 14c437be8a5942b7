// hybrid_attention, or linear_attention where there is no gate.
#include "launch.h"

#include "kernels/cuda/hybrid_attention.cuh"
#include "kernels/cuda/linear_attention.cuh"
#include "kernels/cuda/plan_attention.cpp"

using lol::cuda::AttentionParams;

static const Instance<AttentionParams> instances[] = {
#define ENTRY(T, D, f, sides, V)                                                  \
  {"lol::cuda::hybrid_attention<" #T ", " #D ", " #f ", " #sides ", " #V ">",     \
   lol::cuda::hybrid_attention<T, D, f, sides, V>},                               \
      {"lol::cuda::linear_attention<" #T ", " #D ", " #f ", " #sides ", " #V ">", \
       lol::cuda::linear_attention<T, D, f, sides, V>},
    INSTANCES(ENTRY)
#undef ENTRY
};

template <class Args>
static Args arguments_of(const emulator::Arguments& a) {
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

void run(emulator::Arguments& a) {
  if (a.number<int>("gate.absent")) {
    auto args = arguments_of<lol_linear_attention_args>(a);
    args.normalize = a.number<int>("normalize");
    args.eps = a.number<double>("den_eps");
    args.kv0 = tensor_of(a, "kv0");
    args.ksum0 = tensor_of(a, "ksum0");
    args.kv = tensor_of(a, "kv");
    args.ksum = tensor_of(a, "ksum");
    run_emulated(args, instances);
  } else {
    auto args = arguments_of<lol_hybrid_attention_args>(a);
    args.gate = tensor_of(a, "gate");
    args.window = a.number<int64_t>("window");
    args.window_kind = a.number<int>("window_kind");
    args.sink = a.number<int64_t>("sink");
    args.affine = a.number<int>("affine");
    args.m = tensor_of(a, "m");
    run_emulated(args, instances);
  }
}
