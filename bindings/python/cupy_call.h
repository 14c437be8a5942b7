// Call on CuPy arrays, run on their device and on CuPy's current stream of it.
#pragma once
#include <optional>

#include "python_call.h"

namespace lolcats {

class CupyCall final : public PythonCall {
 public:
  // Whether one of the arguments is a CuPy array. Imports nothing.
  static bool is_asked_for(const py::args& args, const py::kwargs& kwargs);

  using PythonCall::PythonCall;

  lol_context context() override;
  void run(const std::function<int()>& kernel) override;

 private:
  // Makes a device current for as long as it lives.
  struct Current {
    explicit Current(py::object device);
    Current(const Current&) = delete;
    ~Current();
    py::object device;
  };

  lol_tensor view(const py::object& object, const char* name, bool written) override;
  py::object empty(const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
                   const std::vector<py::ssize_t>& strides, void** data) override;

  py::object first_;  // the array that the others have to be beside, and its name
  const char* name_of_first_ = nullptr;
  int32_t device_ = -1;
  std::optional<Current> current_;  // from context() on
};

}  // namespace lolcats
