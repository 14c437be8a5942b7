// The kernels as nvcc compiles them into the library, and their launch. Uses of the CUDA runtime
// that need a driver happen in a launch, never when the library is loaded.
#include <cuda_runtime.h>

#include <cstring>

#include "../check.h"
#include "attention_instances.h"
#include "feature_map.cuh"
#include "hybrid_attention.cuh"
#include "hybrid_attention_step.cuh"
#include "instances.h"
#include "launch.h"
#include "linear_attention.cuh"

namespace lol {
namespace cuda {
namespace {

struct Instance {
  const char* name;
  const void* kernel;
};

const Instance instances[] = {
#define LOL_ENTRY(T, wide)                      \
  {"lol::cuda::feature_map<" #T ", " #wide ">", \
   reinterpret_cast<const void*>(static_cast<void (*)(FeatureMapParams)>(feature_map<T, wide>))},
    LOL_FEATURE_MAP_INSTANCES(LOL_ENTRY)
#undef LOL_ENTRY
#define LOL_ENTRY(T, lanes, rows, wide)                                          \
  {"lol::cuda::hybrid_attention_step<" #T ", " #lanes ", " #rows ", " #wide ">", \
   reinterpret_cast<const void*>(                                                \
       static_cast<void (*)(StepParams)>(hybrid_attention_step<T, lanes, rows, wide>))},
        LOL_STEP_INSTANCES(LOL_ENTRY)
#undef LOL_ENTRY
#define LOL_ENTRY(T, D, f, sides, V, chunk)                                                   \
  {"lol::cuda::hybrid_attention<" #T ", " #D ", " #f ", " #sides ", " #V ", " #chunk ">",     \
   reinterpret_cast<const void*>(                                                             \
       static_cast<void (*)(AttentionParams)>(hybrid_attention<T, D, f, sides, V, chunk>))},  \
      {"lol::cuda::linear_attention<" #T ", " #D ", " #f ", " #sides ", " #V ", " #chunk ">", \
       reinterpret_cast<const void*>(                                                         \
           static_cast<void (*)(AttentionParams)>(linear_attention<T, D, f, sides, V, chunk>))},
            LOL_ATTENTION_INSTANCES(LOL_ENTRY)
#undef LOL_ENTRY
};

int failed(const char* what, cudaError_t error) {
  fail("lolcats_ops: CUDA: %s: %s", what, cudaGetErrorString(error));
  return LOL_ECUDA;
}

#define LOL_CUDA(call) \
  if (const cudaError_t error = (call)) return failed(#call, error)

// Makes a device current, and the one before when it goes.
struct OnDevice {
  int before = -1;
  cudaError_t error;
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before); }
};

}  // namespace

int launch_built_in(const lol_cuda_launch* launch, void*) {
  for (const Instance& instance : instances) {
    if (std::strcmp(instance.name, launch->kernel)) continue;
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
            instance.name, shared, launch->context.device, most);
        return LOL_EUNSUPPORTED;
      }
      LOL_CUDA(cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared));
    }
    void* arguments[] = {const_cast<void*>(launch->params)};
    LOL_CUDA(cudaLaunchKernel(instance.kernel, launch->blocks, launch->threads, arguments, shared,
                              static_cast<cudaStream_t>(launch->context.stream)));
    return LOL_OK;
  }
  fail("lolcats_ops: this build lacks the kernel %s", launch->kernel);
  return LOL_ECUDA;
}

}  // namespace cuda
}  // namespace lol
