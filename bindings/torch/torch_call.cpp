#include "torch_call.h"

#include <cstring>
#include <stdexcept>

namespace lolcats::torch_abi {
namespace {

constexpr int32_t kUnknownDtype = -1;

// torch's own words tell callers who retry with less that memory was short.
void check(Error error, const char* what) {
  if (!error) return;
  const std::string failed = std::string("lolcats_ops: torch failed in ") + what;
  const char* why = last_exception();
  throw std::runtime_error(*why ? failed + ": " + why : failed);
}
#define LOL_TORCH(function, ...) check(function(__VA_ARGS__), #function)

struct DtypePair {
  int32_t torch;
  lol_dtype lol;
};

const DtypePair* dtypes() {
  static const DtypePair table[] = {
      {aoti_torch_dtype_float32(), LOL_F32},
      {aoti_torch_dtype_bfloat16(), LOL_BF16},
      {aoti_torch_dtype_float16(), LOL_F16},
      {aoti_torch_dtype_int64(), LOL_I64},
      {aoti_torch_dtype_int32(), LOL_I32},
      {aoti_torch_dtype_bool(), LOL_BOOL},
      {kUnknownDtype, static_cast<lol_dtype>(kUnknownDtype)},
  };
  return table;
}

// Unknown dtypes stay unknown: the C library names the argument and what it needs.
int32_t from_torch(int32_t dtype) {
  const DtypePair* pair = dtypes();
  while (pair->torch != kUnknownDtype && pair->torch != dtype) ++pair;
  return pair->lol;
}

int32_t to_torch(int32_t dtype) {
  const DtypePair* pair = dtypes();
  while (pair->torch != kUnknownDtype && pair->lol != dtype) ++pair;
  return pair->torch == kUnknownDtype ? aoti_torch_dtype_float32() : pair->torch;
}

std::string device_name(int32_t type, int32_t index) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  const bool cuda = type == aoti_torch_device_type_cuda();
  return (cuda ? "cuda:" : "another device:") + std::to_string(index);
}

}  // namespace

TorchCall::~TorchCall() {
  for (int i = 0; i < argument_count_; ++i) aoti_torch_delete_tensor_object(arguments_[i]);
  for (int i = 0; i < result_count_; ++i) aoti_torch_delete_tensor_object(results_[i]);
}

lol_tensor TorchCall::view(TensorHandle handle, const char* name) {
  arguments_[argument_count_++] = handle;
  int32_t dtype;
  int64_t ndim, *shape, *stride;
  lol_tensor t{};
  expect_device(handle, name);
  LOL_TORCH(aoti_torch_get_dtype, handle, &dtype);
  LOL_TORCH(aoti_torch_get_dim, handle, &ndim);
  LOL_TORCH(aoti_torch_get_sizes, handle, &shape);
  LOL_TORCH(aoti_torch_get_strides, handle, &stride);
  LOL_TORCH(aoti_torch_get_data_ptr, handle, &t.data);
  t.dtype = from_torch(dtype);
  t.ndim = static_cast<int32_t>(ndim);
  if (ndim > 4) {
    if (error_.empty())
      error_ = std::string(name) + " has " + std::to_string(ndim) + " dimensions, more than 4";
    return t;
  }
  std::memcpy(t.shape, shape, ndim * sizeof(int64_t));
  std::memcpy(t.stride, stride, ndim * sizeof(int64_t));
  return t;
}

// Where the first tensor is, all have to be.
void TorchCall::expect_device(TensorHandle handle, const char* name) {
  int32_t type, index;
  LOL_TORCH(aoti_torch_get_device_type, handle, &type);
  LOL_TORCH(aoti_torch_get_device_index, handle, &index);
  if (!first_) {
    first_ = name;
    device_type_ = type;
    device_index_ = index;
  } else if ((type != device_type_ || index != device_index_) && error_.empty()) {
    error_ = std::string(name) + " is on " + device_name(type, index) + ", needs " + first_ +
             "'s " + device_name(device_type_, device_index_);
  }
}

lol_tensor TorchCall::tensor(const char* name) {
  return view(reinterpret_cast<TensorHandle>(next()), name);
}

lol_tensor TorchCall::optional_tensor(const char* name) {
  auto* boxed = reinterpret_cast<StableIValue*>(next());
  if (!boxed) return {};
  const auto handle = reinterpret_cast<TensorHandle>(*boxed);
  delete boxed;
  return view(handle, name);
}

double TorchCall::number(const char*) {
  const StableIValue bits = next();
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

lol_tensor TorchCall::result(const lol_tensor& like) {
  lol_tensor t = like;
  TensorHandle handle;
  LOL_TORCH(aoti_torch_empty_strided, t.ndim, t.shape, t.stride, to_torch(t.dtype), device_type_,
            device_index_, &handle);
  results_[result_count_++] = handle;
  LOL_TORCH(aoti_torch_get_data_ptr, handle, &t.data);
  return t;
}

lol_context TorchCall::context() {
  if (!error_.empty()) throw std::runtime_error("lolcats_ops: " + error_);
  if (device_type_ == aoti_torch_device_type_cpu()) return {-1, nullptr};
  void* stream;
  LOL_TORCH(get_current_cuda_stream, device_index_, &stream);
  return {device_index_, stream};
}

void TorchCall::run(const std::function<int()>& kernel) {
  if (kernel() != LOL_OK) throw std::runtime_error(lol_last_error());
}

void TorchCall::return_results() {
  for (int i = 0; i < result_count_; ++i) stack_[i] = reinterpret_cast<StableIValue>(results_[i]);
  result_count_ = 0;
}

}  // namespace lolcats::torch_abi
