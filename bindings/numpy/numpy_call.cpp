#include "numpy_call.h"

namespace lolcats {
namespace {

int32_t dtype_of(const py::dtype& dtype) {
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

NumpyCall::NumpyCall(const char* op, py::args args, py::kwargs kwargs)
    : op_(op), args_(std::move(args)), kwargs_(std::move(kwargs)) {}

py::object NumpyCall::next(const char* name) {
  if (positional_ < args_.size()) return args_[positional_++];
  if (!kwargs_.contains(name)) return py::none();
  ++by_name_;
  return kwargs_[name];
}

py::object NumpyCall::required(const char* name) {
  py::object object = next(name);
  if (object.is_none()) throw py::type_error(about(name) + " is missing");
  return object;
}

py::array NumpyCall::array(const py::object& object, const char* name) const {
  if (!py::isinstance<py::array>(object)) {
    const auto type = py::str(py::type::of(object).attr("__name__")).cast<std::string>();
    throw py::type_error(about(name) + " is of type " + type + ", not a NumPy array");
  }
  return py::reinterpret_borrow<py::array>(object);
}

lol_tensor NumpyCall::view(const py::object& object, const char* name) {
  py::array a = array(object, name);
  lol_tensor t{};
  t.dtype = dtype_of(a.dtype());
  t.ndim = static_cast<int32_t>(a.ndim());
  if (t.dtype < 0) {
    throw py::type_error(about(name) + " has dtype " + py::str(a.dtype()).cast<std::string>() +
                         "; float32, float16, bfloat16, int32, int64 and bool are known");
  }
  if (t.dtype == LOL_BF16) bfloat16_ = a.dtype();
  if (t.ndim > 4) {
    throw py::value_error(about(name) + " has " + std::to_string(t.ndim) +
                          " dimensions, more than 4");
  }
  for (int i = 0; i < t.ndim; ++i) {
    if (a.strides(i) % a.itemsize()) {
      throw py::value_error(about(name) + " has strides that are no multiple of its item size");
    }
    t.shape[i] = a.shape(i);
    t.stride[i] = a.strides(i) / a.itemsize();
  }
  t.data = const_cast<void*>(a.data());
  arguments_.push_back(std::move(a));
  return t;
}

lol_tensor NumpyCall::mutable_tensor(const char* name) {
  const py::object object = required(name);
  if (!array(object, name).writeable()) throw py::value_error(about(name) + " is read-only");
  return view(object, name);
}

lol_tensor NumpyCall::optional_tensor(const char* name) {
  const py::object object = next(name);
  return object.is_none() ? lol_tensor{} : view(object, name);
}

template <class T>
T NumpyCall::scalar(const char* name, const char* need) {
  const py::object object = required(name);
  try {
    return object.cast<T>();
  } catch (const py::cast_error&) {
    throw py::type_error(about(name) + " is " + py::repr(object).cast<std::string>() + ", not " +
                         need);
  }
}

lol_context NumpyCall::context() {
  if (positional_ < args_.size() || by_name_ < kwargs_.size())
    throw py::type_error(std::string(op_) + ": more arguments than its schema, or unknown names");
  return {-1, nullptr};
}

lol_tensor NumpyCall::result(const lol_tensor& like) {
  const py::object dtype = like.dtype == LOL_BF16  ? bfloat16_
                           : like.dtype == LOL_F16 ? py::dtype("float16")
                                                   : py::dtype::of<float>();
  std::vector<py::ssize_t> shape(like.shape, like.shape + like.ndim), stride(like.ndim);
  const auto size = py::reinterpret_borrow<py::dtype>(dtype).itemsize();
  for (int i = 0; i < like.ndim; ++i) stride[i] = like.stride[i] * size;
  py::array a(py::reinterpret_borrow<py::dtype>(dtype), shape, stride);
  lol_tensor t = like;
  t.data = a.mutable_data();
  results_.push_back(std::move(a));
  return t;
}

void NumpyCall::run(const std::function<int()>& kernel) {
  int status;
  {
    py::gil_scoped_release release;
    status = kernel();
  }
  if (status == LOL_ENOMEM) throw std::bad_alloc();
  if (status != LOL_OK) throw py::value_error(lol_last_error());
}

py::object NumpyCall::results() const {
  if (results_.size() == 1) return results_[0];
  py::tuple all(results_.size());
  for (size_t i = 0; i < results_.size(); ++i) all[i] = results_[i];
  return std::move(all);
}

}  // namespace lolcats
