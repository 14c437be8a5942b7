// The part of LibTorch's stable C ABI (torch >= 2.10; torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h) that the operators need. Declared here and resolved with dlsym, so
// that building needs no torch and one binary serves every torch, with CUDA or without.
#pragma once
#include <cstdint>

namespace lolcats::torch_abi {

using Error = int32_t;
using TensorHandle = struct AtenTensorOpaque*;
using LibraryHandle = struct TorchLibraryOpaque*;
using StableIValue = uint64_t;
using BoxedKernel = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

// The StableIValue conventions of torch 2.10; newer versions of torch adapt to them.
constexpr uint64_t kVersion = (2ull << 56) | (10ull << 48);

#define LOL_TORCH_FUNCTIONS(X)                                                                     \
  X(Error, aoti_torch_library_init_fragment, (const char*, const char*, uint32_t, LibraryHandle*)) \
  X(Error, aoti_torch_library_init_impl,                                                           \
    (const char*, const char*, const char*, uint32_t, LibraryHandle*))                             \
  X(Error, aoti_torch_library_def, (LibraryHandle, const char*))                                   \
  X(Error, torch_library_impl, (LibraryHandle, const char*, BoxedKernel, uint64_t))                \
  X(Error, aoti_torch_get_dtype, (TensorHandle, int32_t*))                                         \
  X(Error, aoti_torch_get_dim, (TensorHandle, int64_t*))                                           \
  X(Error, aoti_torch_get_sizes, (TensorHandle, int64_t**))                                        \
  X(Error, aoti_torch_get_strides, (TensorHandle, int64_t**))                                      \
  X(Error, aoti_torch_get_data_ptr, (TensorHandle, void**))                                        \
  X(Error, aoti_torch_get_device_type, (TensorHandle, int32_t*))                                   \
  X(Error, aoti_torch_get_device_index, (TensorHandle, int32_t*))                                  \
  X(Error, aoti_torch_empty_strided,                                                               \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, TensorHandle*))           \
  X(Error, aoti_torch_delete_tensor_object, (TensorHandle))                                        \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                       \
  X(int32_t, aoti_torch_device_type_cuda, ())                                                      \
  X(int32_t, aoti_torch_dtype_float32, ())                                                         \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                        \
  X(int32_t, aoti_torch_dtype_float16, ())                                                         \
  X(int32_t, aoti_torch_dtype_int32, ())                                                           \
  X(int32_t, aoti_torch_dtype_int64, ())                                                           \
  X(int32_t, aoti_torch_dtype_bool, ())

#define LOL_DECLARE(result, name, arguments) extern result(*name) arguments;
LOL_TORCH_FUNCTIONS(LOL_DECLARE)
#undef LOL_DECLARE

enum class Loaded { kYes, kNoTorch, kTooOld };

// Resolves the functions above from the torch in this process; never loads one.
Loaded load();

// The current stream of a CUDA device. Only CUDA builds of torch have it: it is looked for when it
// is first needed, and an error where it is missing.
Error get_current_cuda_stream(int32_t device, void** stream);

// What torch says of the error that it has just returned in this thread; empty before torch 2.13.
const char* last_exception();

}  // namespace lolcats::torch_abi
