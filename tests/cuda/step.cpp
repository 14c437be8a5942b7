// hybrid_attention_step_ on pieces of a sequence: one call for the tokens between successive cuts.
#include "launch.h"

#include "kernels/cuda/hybrid_attention_step.cuh"

#ifndef INSTANCES
#define INSTANCES LOL_STEP_INSTANCES
#endif

static const Instance<lol::cuda::StepParams> instances[] = {
#define ENTRY(T, lanes, rows, wide)                                              \
  {"lol::cuda::hybrid_attention_step<" #T ", " #lanes ", " #rows ", " #wide ">", \
   lol::cuda::hybrid_attention_step<T, lanes, rows, wide>},
    INSTANCES(ENTRY)
#undef ENTRY
};

static lol_tensor tokens(lol_tensor t, int64_t begin, int64_t end) {
  t.data = static_cast<char*>(t.data) + begin * t.stride[2] * (t.dtype == LOL_F32 ? 4 : 2);
  t.shape[2] = end - begin;
  return t;
}

void run(emulator::Arguments& a) {
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
  const lol_tensor cuts = tensor_of(a, "cuts");
  const int64_t* at = static_cast<const int64_t*>(cuts.data);
  for (int64_t i = 0; i + 1 < cuts.shape[0]; i++) {
    args.q = tokens(tensor_of(a, "q"), at[i], at[i + 1]);
    args.k = tokens(tensor_of(a, "k"), at[i], at[i + 1]);
    args.v = tokens(tensor_of(a, "v"), at[i], at[i + 1]);
    args.o = tokens(tensor_of(a, "o"), at[i], at[i + 1]);
    run_emulated(args, instances);
  }
}
