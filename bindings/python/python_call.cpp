#include "python_call.h"

#include <new>
#include <stdexcept>
#include <type_traits>

namespace lolcats {
namespace {

int32_t dtype_of(const py::dtype& dtype) {
  if (dtype.byteorder() == '<' || dtype.byteorder() == '>') return -1;  // native is '='
  const auto size = dtype.itemsize();
  switch (dtype.kind()) {
    case 'f':
      return size == 4 ? LOL_F32 : size == 2 ? LOL_F16 : -1;
    case 'i':
      return size == 8 ? LOL_I64 : size == 4 ? LOL_I32 : -1;
    case 'b':
      return LOL_BOOL;
    default:
      return py::str(dtype).cast<std::string>() == "bfloat16" ? LOL_BF16 : -1;
  }
}

}  // namespace

py::object PythonCall::next(const char* name) {
  if (positional_ < args_.size()) return args_[positional_++];
  if (!kwargs_.contains(name)) return py::none();
  ++by_name_;
  return kwargs_[name];
}

py::object PythonCall::required(const char* name) {
  py::object object = next(name);
  if (object.is_none()) throw py::type_error(about(name) + " is missing, or None");
  return object;
}

lol_tensor PythonCall::optional_tensor(const char* name) {
  const py::object object = next(name);
  return object.is_none() ? lol_tensor{} : view(object, name, false);
}

template <class T>
T PythonCall::scalar(const char* name, const char* need) {
  const py::object object = required(name);
  try {
    return object.cast<T>();
  } catch (const py::cast_error&) {
    const auto value = about(name) + " is " + py::repr(object).cast<std::string>();
    if (std::is_same_v<T, int64_t> && py::isinstance<py::int_>(object))
      throw py::value_error(value + ", beyond 64 bits");
    throw py::type_error(value + ", not " + need);
  }
}
template int64_t PythonCall::scalar(const char*, const char*);
template double PythonCall::scalar(const char*, const char*);
template bool PythonCall::scalar(const char*, const char*);

lol_tensor PythonCall::described(const py::dtype& dtype, py::ssize_t ndim, const char* name) {
  lol_tensor t{};
  t.dtype = dtype_of(dtype);
  t.ndim = static_cast<int32_t>(ndim);
  if (t.dtype < 0) {
    throw py::type_error(
        about(name) + " has dtype " + py::str(dtype).cast<std::string>() +
        ", which no operator takes: needs float32, float16 or bfloat16, of indices int32 or int64, "
        "of masks bool, in native byte order");
  }
  if (t.dtype == LOL_BF16) bfloat16_ = dtype;
  if (ndim > 4) {
    throw py::value_error(about(name) + " has " + std::to_string(ndim) +
                          " dimensions, more than 4");
  }
  return t;
}

lol_tensor PythonCall::result(const lol_tensor& like) {
  const py::dtype dtype = like.dtype == LOL_BF16  ? bfloat16_
                          : like.dtype == LOL_F16 ? py::dtype("float16")
                                                  : py::dtype::of<float>();
  const std::vector<py::ssize_t> shape(like.shape, like.shape + like.ndim);
  std::vector<py::ssize_t> strides(like.stride, like.stride + like.ndim);
  for (py::ssize_t& stride : strides) stride *= dtype.itemsize();
  lol_tensor t = like;
  results_.push_back(empty(dtype, shape, strides, &t.data));
  return t;
}

py::object PythonCall::results() const {
  if (results_.size() == 1) return results_[0];
  py::tuple all(results_.size());
  for (size_t i = 0; i < results_.size(); ++i) all[i] = results_[i];
  return std::move(all);
}

void PythonCall::check_all_arguments_were_read() const {
  if (positional_ < args_.size() || by_name_ < kwargs_.size())
    throw py::type_error(std::string(op_) + ": more arguments than its schema, or unknown names");
}

void PythonCall::check_status(int status) {
  if (status == LOL_ENOMEM) throw std::bad_alloc();
  if (status == LOL_ECUDA) throw std::runtime_error(lol_last_error());
  if (status != LOL_OK) throw py::value_error(lol_last_error());
}

void PythonCall::refuse_type(const py::object& object, const char* name, const char* need) const {
  const py::object type = py::type::of(object);
  const auto module = type.attr("__module__").cast<std::string>();
  const auto type_name = type.attr("__qualname__").cast<std::string>();
  throw py::type_error(about(name) + " is of type " +
                       (module == "builtins" ? type_name : module + "." + type_name) + ", not " +
                       need);
}

}  // namespace lolcats
