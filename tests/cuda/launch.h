// Plans a call of the C ABI and runs its kernel in the emulator, or fails the way the library does.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_harness.h"
#include "kernels/check.cpp"
#include "kernels/cuda/plan.cpp"

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

template <class Params>
struct Instance {
  const char* name;
  void (*kernel)(const Params);
};

template <class Params, class Args, int n>
void launch(const Args& args, const Instance<Params> (&instances)[n]) {
  lol::cuda::Plan plan;
  Params params;
  if (lol::check(args) || lol::cuda::plan(args, &plan, &params)) {
    std::fprintf(stderr, "emulator: %s\n", lol::last_error());
    std::exit(1);
  }
  if (!plan.blocks) return;
  for (const Instance<Params>& instance : instances) {
    if (std::strcmp(instance.name, plan.kernel)) continue;
    return emulator::launch(instance.kernel, static_cast<unsigned>(plan.blocks),
                            static_cast<unsigned>(plan.threads), plan.shared_bytes, params);
  }
  std::fprintf(stderr, "emulator: %s is not in this program\n", plan.kernel);
  std::exit(1);
}
