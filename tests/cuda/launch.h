// Calls of the C ABI whose kernels run in the emulator; the library's own sources, but for the
// CPU's.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_harness.h"
#include "kernels/check.cpp"
#include "kernels/cuda/launch.cpp"
#include "kernels/cuda/plan.cpp"
#include "kernels/cuda/plan_attention.cpp"

// A tensor of the Python side with its shape and strides, which come as numbers; absent if None.
inline lol_tensor tensor_of(const emulator::Arguments& a, const std::string& name) {
  lol_tensor t = {};
  if (a.number<int>(name + ".absent")) return t;
  t.data = a.tensor<void>(name);
  t.dtype = a.number<int>(name + ".dtype");
  t.ndim = a.number<int>(name + ".ndim");
  for (int i = 0; i < t.ndim; i++) {
    t.shape[i] = a.number<int64_t>(name + ".shape" + std::to_string(i));
    t.stride[i] = a.number<int64_t>(name + ".stride" + std::to_string(i));
  }
  return t;
}

inline lol_features features_of(const emulator::Arguments& a, const std::string& which) {
  return {tensor_of(a, "weight_" + which), tensor_of(a, "bias_" + which),
          a.number<int>("activation"),     a.number<int>("two_sided"),
          a.number<int>("skip"),           a.number<double>("eps")};
}

// The launcher of the C ABI: the instance that the plan names, on the params it has filled.
template <class Params>
struct Instance {
  const char* name;
  void (*kernel)(const Params);
};

template <class Params, int n>
struct Gpu {
  const Instance<Params> (&instances)[n];
  uint32_t most_shared_bytes;
};

template <class Params, int n>
int launch(const lol_cuda_launch* launch, void* user) {
  const auto& gpu = *static_cast<const Gpu<Params, n>*>(user);
  if (launch->shared_bytes > gpu.most_shared_bytes) {
    lol::fail("%s needs %u bytes of shared memory", launch->kernel, launch->shared_bytes);
    return LOL_EUNSUPPORTED;
  }
  for (const Instance<Params>& instance : gpu.instances) {
    if (std::strcmp(instance.name, launch->kernel)) continue;
    emulator::launch(instance.kernel, launch->blocks, launch->threads, launch->shared_bytes,
                     *static_cast<const Params*>(launch->params));
    return LOL_OK;
  }
  lol::fail("%s is not in this program", launch->kernel);
  return LOL_ECUDA;
}

// Checks and runs a call, as the library would for CUDA tensors; by default on sm_80.
template <class Params, class Args, int n>
void run_emulated(Args& args, const Instance<Params> (&instances)[n],
                  uint32_t most_shared_bytes = 163 << 10) {
  args.struct_size = sizeof args;
  args.context.device = 0;
  Gpu<Params, n> gpu = {instances, most_shared_bytes};
  lol_set_cuda_launcher(launch<Params, n>, &gpu);
  if (!lol::check(args) && !lol::cuda::run(args)) return;
  std::fprintf(stderr, "emulator: %s\n", lol::last_error());
  std::exit(1);
}
