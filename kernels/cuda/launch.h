// Runs checked calls of the C ABI on CUDA: plans them and hands them to the launcher.
#pragma once
#include "lolcats_ops/lolcats_ops.h"

namespace lol {
namespace cuda {

bool can_launch();
int run(const lol_feature_map_args& a);
int run(const lol_linear_attention_args& a);
int run(const lol_hybrid_attention_args& a);
int run(const lol_hybrid_attention_step_args& a);

// The launcher of builds that have the kernels (built_in.cu).
int launch_built_in(const lol_cuda_launch* launch, void*);

}  // namespace cuda
}  // namespace lol
