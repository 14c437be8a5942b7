// Call on tensors that are described, not there: what the C library would launch for them.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "../operators.h"

namespace lolcats {

namespace py = pybind11;

struct CudaLaunch {
  std::string kernel;
  uint32_t blocks, threads, shared_bytes;
};

// Arguments are given in schema order; a tensor is (lol_dtype, shape), contiguous, or None. A block
// may have so many bytes of shared memory.
class DescribedCall final : public Call {
 public:
  DescribedCall(py::args args, uint32_t most_shared_bytes)
      : args_(std::move(args)), most_shared_bytes_(most_shared_bytes) {}

  lol_tensor tensor(const char*) override { return described(next()); }
  lol_tensor mutable_tensor(const char*) override { return described(next()); }
  lol_tensor optional_tensor(const char*) override;
  int64_t integer(const char*) override { return next().cast<int64_t>(); }
  double number(const char*) override { return next().cast<double>(); }
  bool boolean(const char*) override { return next().cast<bool>(); }

  lol_tensor result(const lol_tensor& like) override;
  lol_context context() override { return {0, nullptr}; }
  void run(const std::function<int()>& kernel) override;

  const std::vector<CudaLaunch>& launches() const { return launches_; }

 private:
  static int note(const lol_cuda_launch* launch, void* call);
  py::object next() { return args_[position_++]; }
  static lol_tensor described(const py::object& object);

  py::args args_;
  size_t position_ = 0;
  uint32_t most_shared_bytes_;
  std::vector<CudaLaunch> launches_;
};

}  // namespace lolcats
