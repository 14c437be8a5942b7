// Call on Python arguments that are NumPy arrays and numbers.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../operators.h"

namespace lolcats {

namespace py = pybind11;

// Arguments are given by position or by keyword, under their schema names; an optional array may
// be left out. bfloat16 is ml_dtypes' dtype. Arrays keep their strides, nothing is copied.
class NumpyCall final : public Call {
 public:
  NumpyCall(const char* op, py::args args, py::kwargs kwargs);

  lol_tensor tensor(const char* name) override { return view(required(name), name); }
  lol_tensor mutable_tensor(const char* name) override;
  lol_tensor optional_tensor(const char* name) override;
  int64_t integer(const char* name) override { return scalar<int64_t>(name, "an integer"); }
  double number(const char* name) override { return scalar<double>(name, "a number"); }
  bool boolean(const char* name) override { return scalar<bool>(name, "a bool"); }

  lol_tensor result(const lol_tensor& like) override;
  lol_context context() override;
  void run(const std::function<int()>& kernel) override;

  py::object results() const;  // one array, or a tuple of them

 private:
  py::object next(const char* name);  // none if not given
  py::object required(const char* name);
  py::array array(const py::object& object, const char* name) const;
  lol_tensor view(const py::object& object, const char* name);
  template <class T>
  T scalar(const char* name, const char* need);
  std::string about(const char* name) const { return std::string(op_) + ": " + name; }

  const char* op_;
  py::args args_;
  py::kwargs kwargs_;
  size_t positional_ = 0, by_name_ = 0;
  std::vector<py::array> arguments_, results_;
  py::object bfloat16_;  // the dtype object of an argument, for results
};

}  // namespace lolcats
