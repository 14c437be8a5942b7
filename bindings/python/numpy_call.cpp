#include "numpy_call.h"

#include <cstring>

namespace lolcats {

lol_tensor NumpyCall::view(const py::object& object, const char* name, bool written) {
  if (!py::isinstance<py::array>(object)) {
    const bool convertible = py::hasattr(object, "__array__");
    refuse_type(object, name,
                convertible ? "a NumPy array, which numpy.asarray makes of it" : "a NumPy array");
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  const bool subclass = std::strcmp(Py_TYPE(object.ptr())->tp_name, "numpy.ndarray") != 0;
  if (subclass && py::hasattr(object, "mask"))
    throw py::type_error(about(name) + " is a masked array, whose mask would be ignored");
  if (written && !array.writeable()) throw py::value_error(about(name) + " is read-only");
  return view_of(array, name);
}

py::object NumpyCall::empty(const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
                            const std::vector<py::ssize_t>& strides, void** data) {
  py::array array(dtype, shape, strides);
  *data = array.mutable_data();
  return std::move(array);
}

lol_context NumpyCall::context() {
  check_all_arguments_were_read();
  return {-1, nullptr};
}

void NumpyCall::run(const std::function<int()>& kernel) {
  int status;
  {
    py::gil_scoped_release release;
    status = kernel();
  }
  check_status(status);
}

}  // namespace lolcats
