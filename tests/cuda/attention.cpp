// hybrid_attention, or linear_attention where there is no gate.
#include "attention_arguments.h"

#include "kernels/cuda/hybrid_attention.cuh"
#include "kernels/cuda/linear_attention.cuh"

using lol::cuda::AttentionParams;

static const Instance<AttentionParams> instances[] = {
#define ENTRY(...)                                                                             \
  {"lol::cuda::hybrid_attention<" #__VA_ARGS__ ">", lol::cuda::hybrid_attention<__VA_ARGS__>}, \
      {"lol::cuda::linear_attention<" #__VA_ARGS__ ">", lol::cuda::linear_attention<__VA_ARGS__>},
    INSTANCES(ENTRY)
#undef ENTRY
};

void run(emulator::Arguments& a) {
  const auto most_shared_bytes = a.number<uint32_t>("most_shared_bytes");
  if (a.number<int>("gate.absent")) {
    auto args = linear_arguments(a);
    run_emulated(args, instances, most_shared_bytes);
  } else {
    auto args = hybrid_arguments(a);
    run_emulated(args, instances, most_shared_bytes);
  }
}
