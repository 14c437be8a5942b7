// Tells how a call would be launched, instead of launching it, and where the tensors are, so that
// their addresses are found in the params.
#pragma once
#include <vector>

#include "launch.h"

inline int tell_launch(const lol_cuda_launch* launch, void* user) {
  const auto& a = *static_cast<emulator::Arguments*>(user);
  const int64_t numbers[] = {launch->blocks, launch->threads, launch->shared_bytes,
                             static_cast<int64_t>(launch->params_size)};
  std::memcpy(a.tensor<int64_t>("launch"), numbers, sizeof numbers);
  std::memcpy(a.tensor<char>("params"), launch->params, launch->params_size);
  std::strcpy(a.tensor<char>("kernel"), launch->kernel);
  return LOL_OK;
}

template <class Args>
void tell(emulator::Arguments& a, Args& args, const std::vector<lol_tensor>& tensors) {
  int64_t* addresses = a.tensor<int64_t>("addresses");
  for (const lol_tensor& t : tensors) *addresses++ = reinterpret_cast<int64_t>(t.data);
  args.struct_size = sizeof args;
  args.context.device = 0;
  lol_set_cuda_launcher(tell_launch, &a);
  if (lol::check(args) || lol::cuda::run(args)) std::abort();
}
