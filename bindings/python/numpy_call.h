// Call on NumPy arrays, run on the CPU.
#pragma once
#include "python_call.h"

namespace lolcats {

class NumpyCall final : public PythonCall {
 public:
  using PythonCall::PythonCall;

  lol_context context() override;
  void run(const std::function<int()>& kernel) override;

 private:
  lol_tensor view(const py::object& object, const char* name, bool written) override;
  py::object empty(const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
                   const std::vector<py::ssize_t>& strides, void** data) override;
};

}  // namespace lolcats
