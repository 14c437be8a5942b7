// Launches of the kernels that are built in. Uses of the CUDA runtime that need a driver happen in
// a launch, never when the library is loaded.
#include <cuda_runtime.h>

#include <cstring>

#include "../check.h"
#include "built_in.h"
#include "launch.h"

namespace lol {
namespace cuda {
namespace {

int failed(const char* what, cudaError_t error) {
  fail("lolcats_ops: CUDA: %s: %s", what, cudaGetErrorString(error));
  return LOL_ECUDA;
}

#define LOL_CUDA(call) \
  if (const cudaError_t error = (call)) return failed(#call, error)

// Makes a device current, and the one before when it goes.
struct OnDevice {
  const int device;
  int before = device;
  cudaError_t error;
  explicit OnDevice(int wanted) : device(wanted) {
    error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (before != device) cudaSetDevice(before);
  }
};

}  // namespace

const BuiltIns* BuiltIns::all_ = nullptr;

const BuiltIn* BuiltIns::find(const char* name) {
  for (const BuiltIns* some = all_; some; some = some->next_) {
    for (int i = 0; i < some->count_; i++)
      if (!std::strcmp(some->kernels_[i].name, name)) return &some->kernels_[i];
  }
  return nullptr;
}

int launch_built_in(const lol_cuda_launch* launch, void*) {
  const BuiltIn* built_in = BuiltIns::find(launch->kernel);
  if (!built_in) {
    fail("lolcats_ops: this build lacks the kernel %s", launch->kernel);
    return LOL_ECUDA;
  }
  const OnDevice on_device(launch->context.device);
  LOL_CUDA(on_device.error);
  const int shared = static_cast<int>(launch->shared_bytes);
  if (shared > 48 * 1024) {  // more has to be asked for
    int most;
    LOL_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    launch->context.device));
    if (shared > most) {
      fail(
          "lolcats_ops: %s needs %d bytes of shared memory, a block of device %d has %d: use the "
          "Triton kernels",
          launch->kernel, shared, launch->context.device, most);
      return LOL_EUNSUPPORTED;
    }
    // The same number from all threads, since it is one for all: what a step's kernel needs depends
    // on the call. Kernels have no shared memory but this.
    LOL_CUDA(
        cudaFuncSetAttribute(built_in->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  }
  void* arguments[] = {const_cast<void*>(launch->params)};
  LOL_CUDA(cudaLaunchKernel(built_in->kernel, launch->blocks, launch->threads, arguments, shared,
                            static_cast<cudaStream_t>(launch->context.stream)));
  return LOL_OK;
}

}  // namespace cuda
}  // namespace lol
