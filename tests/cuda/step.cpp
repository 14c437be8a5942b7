// hybrid_attention_step_ on pieces of a sequence: one call for the tokens between successive cuts.
#include "step_arguments.h"

#include "kernels/cuda/hybrid_attention_step.cuh"

static const Instance<lol::cuda::StepParams> instances[] = {
#define ENTRY(...)                                       \
  {"lol::cuda::hybrid_attention_step<" #__VA_ARGS__ ">", \
   lol::cuda::hybrid_attention_step<__VA_ARGS__>},
    INSTANCES(ENTRY)
#undef ENTRY
};

void run(emulator::Arguments& a) {
  lol_hybrid_attention_step_args args = step_arguments(a);
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
