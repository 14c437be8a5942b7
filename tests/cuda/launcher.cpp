// A launcher of the C ABI (lol_set_cuda_launcher) that runs kernels on the memory of its process.
#include <cstring>

#include "cuda_harness.h"
#include "kernels/cuda/feature_map.cuh"
#include "kernels/cuda/hybrid_attention.cuh"
#include "kernels/cuda/hybrid_attention_step.cuh"
#include "kernels/cuda/linear_attention.cuh"
#include "lolcats_ops/lolcats_ops.h"

namespace {

template <class Params, void (*kernel)(const Params)>
void run_kernel(const lol_cuda_launch& launch) {
  emulator::launch(kernel, launch.blocks, launch.threads, launch.shared_bytes,
                   *static_cast<const Params*>(launch.params));
}

struct Instance {
  const char* name;
  void (*run)(const lol_cuda_launch& launch);
};

#define INSTANCE(Params, kernel, ...)          \
  {"lol::cuda::" #kernel "<" #__VA_ARGS__ ">", \
   run_kernel<lol::cuda::Params, lol::cuda::kernel<__VA_ARGS__>>},
#define FEATURE_MAP(...) INSTANCE(FeatureMapParams, feature_map, __VA_ARGS__)
#define STEP(...) INSTANCE(StepParams, hybrid_attention_step, __VA_ARGS__)
#define ATTENTION(...)                                     \
  INSTANCE(AttentionParams, hybrid_attention, __VA_ARGS__) \
  INSTANCE(AttentionParams, linear_attention, __VA_ARGS__)
const Instance instances[] = {FEATURE_MAPS(FEATURE_MAP) STEPS(STEP) ATTENTIONS(ATTENTION)};

}  // namespace

// `last` gets a copy of the launch.
extern "C" int launch(const lol_cuda_launch* launch, void* last) {
  for (const Instance& instance : instances) {
    if (std::strcmp(instance.name, launch->kernel)) continue;
    instance.run(*launch);
    std::memcpy(last, launch, sizeof *launch);
    return LOL_OK;
  }
  std::fprintf(stderr, "emulator: %s is not in this library\n", launch->kernel);
  return LOL_ECUDA;
}
