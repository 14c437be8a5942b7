// What calls on Python arguments have in common, whichever library their arrays are of.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../operators.h"

namespace lolcats {

namespace py = pybind11;

// Arguments are given by position or by keyword, under their schema names; an optional array may
// be left out. Dtypes are NumPy's, bfloat16 that of ml_dtypes. Arrays keep their strides, nothing
// is copied.
class PythonCall : public Call {
 public:
  PythonCall(const char* op, py::args args, py::kwargs kwargs)
      : op_(op), args_(std::move(args)), kwargs_(std::move(kwargs)) {}

  lol_tensor tensor(const char* name) final { return view(required(name), name, false); }
  lol_tensor mutable_tensor(const char* name) final { return view(required(name), name, true); }
  lol_tensor optional_tensor(const char* name) final;
  int64_t integer(const char* name) final { return scalar<int64_t>(name, "an integer"); }
  double number(const char* name) final { return scalar<double>(name, "a number"); }
  bool boolean(const char* name) final { return scalar<bool>(name, "a bool"); }
  lol_tensor result(const lol_tensor& like) final;

  py::object results() const;  // one array, or a tuple of them

 protected:
  ~PythonCall() = default;

  // An argument as the C library sees it; `written` if it changes it.
  virtual lol_tensor view(const py::object& object, const char* name, bool written) = 0;
  // A new array, strides in bytes, and where its data are.
  virtual py::object empty(const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
                           const std::vector<py::ssize_t>& strides, void** data) = 0;

  // The same of an Array, which has the members of py::array.
  template <class Array>
  lol_tensor view_of(const Array& array, const char* name) {
    lol_tensor t = described(array.dtype(), array.ndim(), name);
    for (int i = 0; i < t.ndim; ++i) {
      if (array.strides(i) % array.itemsize()) {
        throw py::value_error(about(name) + " has strides that are no multiple of its item size");
      }
      t.shape[i] = array.shape(i);
      t.stride[i] = array.strides(i) / array.itemsize();
    }
    t.data = const_cast<void*>(array.data());
    return t;
  }

  void check_all_arguments_were_read() const;
  static void check_status(int status);  // throws lol_last_error()
  [[noreturn]] void refuse_type(const py::object& object, const char* name, const char* need) const;
  std::string about(const char* name) const { return std::string(op_) + ": " + name; }

 private:
  py::object next(const char* name);  // none if not given
  py::object required(const char* name);
  template <class T>
  T scalar(const char* name, const char* need);
  lol_tensor described(const py::dtype& dtype, py::ssize_t ndim, const char* name);

  const char* op_;
  py::args args_;
  py::kwargs kwargs_;
  size_t positional_ = 0, by_name_ = 0;
  std::vector<py::object> results_;
  py::dtype bfloat16_;  // of an argument, for results
};

}  // namespace lolcats
