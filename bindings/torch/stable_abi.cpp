#include "stable_abi.h"

#include <dlfcn.h>

namespace lolcats::torch_abi {

#define LOL_DEFINE(result, name, arguments) result(*name) arguments = nullptr;
LOL_TORCH_FUNCTIONS(LOL_DEFINE)
#undef LOL_DEFINE

Loaded load() {
#ifdef __APPLE__
  void* torch = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
#else
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
#endif
  if (!torch) return Loaded::kNoTorch;
#define LOL_RESOLVE(result, name, arguments)                         \
  name = reinterpret_cast<result(*) arguments>(dlsym(torch, #name)); \
  if (!name) return Loaded::kTooOld;
  LOL_TORCH_FUNCTIONS(LOL_RESOLVE)
#undef LOL_RESOLVE
  return Loaded::kYes;
}

}  // namespace lolcats::torch_abi
