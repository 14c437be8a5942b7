// How a checked call of the C ABI is launched: which instance of which kernel, how many blocks and
// threads, how much shared memory, and what the kernel is told. Knows no CUDA: every build has it,
// so that programs that compile kernels themselves, and tests, launch the same.
#pragma once
#include <cstddef>

#include "attention_params.h"
#include "lolcats_ops/lolcats_ops.h"
#include "params.h"

namespace lol {
namespace cuda {

struct Plan {
  const char* kernel;  // a C++ name expression
  int64 blocks;        // 0: there is nothing to do
  int threads;
  int shared_bytes;
};

// The first choice among those that take at most so many bytes of shared memory. LOL_OK;
// LOL_EUNSUPPORTED if there is none, and its message if that is not for want of memory.
int plan(const lol_feature_map_args& a, int most_shared_bytes, Plan* plan,
         FeatureMapParams* params);
int plan(const lol_hybrid_attention_args& a, int most_shared_bytes, Plan* plan,
         AttentionParams* params);
int plan(const lol_linear_attention_args& a, int most_shared_bytes, Plan* plan,
         AttentionParams* params);
int plan(const lol_hybrid_attention_step_args& a, int most_shared_bytes, Plan* plan,
         StepParams* params);

}  // namespace cuda
}  // namespace lol
