// hybrid_attention, or linear_attention where there is no gate.
#include "attention_arguments.h"

#include "kernels/cuda/hybrid_attention.cuh"
#include "kernels/cuda/linear_attention.cuh"

using lol::cuda::AttentionParams;

static const Instance<AttentionParams> instances[] = {
#define ENTRY(T, D, f, sides, V, chunk)                                                       \
  {"lol::cuda::hybrid_attention<" #T ", " #D ", " #f ", " #sides ", " #V ", " #chunk ">",     \
   lol::cuda::hybrid_attention<T, D, f, sides, V, chunk>},                                    \
      {"lol::cuda::linear_attention<" #T ", " #D ", " #f ", " #sides ", " #V ", " #chunk ">", \
       lol::cuda::linear_attention<T, D, f, sides, V, chunk>},
    INSTANCES(ENTRY)
#undef ENTRY
};

void run(emulator::Arguments& a) {
  if (a.number<int>("gate.absent")) {
    auto args = linear_arguments(a);
    run_emulated(args, instances);
  } else {
    auto args = hybrid_arguments(a);
    run_emulated(args, instances);
  }
}
