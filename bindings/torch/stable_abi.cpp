#include "stable_abi.h"

#include <dlfcn.h>

namespace lolcats::torch_abi {

#define LOL_DEFINE(result, name, arguments) result(*name) arguments = nullptr;
LOL_TORCH_FUNCTIONS(LOL_DEFINE)
#undef LOL_DEFINE

namespace {

#ifdef __APPLE__
#define LOL_LIBRARY(name) "lib" name ".dylib"
#else
#define LOL_LIBRARY(name) "lib" name ".so"
#endif

void* loaded(const char* library) { return dlopen(library, RTLD_NOLOAD | RTLD_LAZY); }

}  // namespace

Loaded load() {
  void* torch = loaded(LOL_LIBRARY("torch_cpu"));
  if (!torch) return Loaded::kNoTorch;
#define LOL_RESOLVE(result, name, arguments)                         \
  name = reinterpret_cast<result(*) arguments>(dlsym(torch, #name)); \
  if (!name) return Loaded::kTooOld;
  LOL_TORCH_FUNCTIONS(LOL_RESOLVE)
#undef LOL_RESOLVE
  return Loaded::kYes;
}

const char* last_exception() {
  using Function = const char* (*)();
  static const auto function = reinterpret_cast<Function>(
      dlsym(loaded(LOL_LIBRARY("torch_cpu")), "torch_exception_get_what_without_backtrace"));
  return function ? function() : "";
}

Error get_current_cuda_stream(int32_t device, void** stream) {
  using Function = Error (*)(int32_t, void**);
  static const auto function = [] {
    void* torch = loaded(LOL_LIBRARY("torch_cuda"));
    return torch ? reinterpret_cast<Function>(dlsym(torch, "aoti_torch_get_current_cuda_stream"))
                 : nullptr;
  }();
  return function ? function(device, stream) : 1;
}

}  // namespace lolcats::torch_abi
