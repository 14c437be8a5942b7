#include "cupy_call.h"

#include <pybind11/stl.h>

#include <exception>

#include "cuda_launcher.h"

namespace lolcats {
namespace {

// CuPy, or nothing where nobody has imported all of it: then there are no arrays of it.
py::object cupy() {
  const py::str name("cupy");
  auto module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  if (!module) PyErr_Clear();
  return module && py::hasattr(module, "ndarray") ? module : py::object();
}

void* pointer(const py::handle& pointing) {  // a MemoryPointer or a Stream
  return reinterpret_cast<void*>(pointing.attr("ptr").cast<uintptr_t>());
}

// A CuPy array with the members of py::array. CuPy's dtypes are NumPy's.
class CupyArray {
 public:
  explicit CupyArray(const py::object& array)
      : array_(array), shape_(array.attr("shape")), strides_(array.attr("strides")) {}
  py::dtype dtype() const { return array_.attr("dtype"); }
  py::ssize_t ndim() const { return static_cast<py::ssize_t>(shape_.size()); }
  py::ssize_t itemsize() const { return dtype().itemsize(); }
  py::ssize_t shape(int i) const { return shape_[i].cast<py::ssize_t>(); }
  py::ssize_t strides(int i) const { return strides_[i].cast<py::ssize_t>(); }
  const void* data() const { return pointer(array_.attr("data")); }

 private:
  const py::object& array_;
  py::tuple shape_, strides_;
};

}  // namespace

bool CupyCall::is_asked_for(const py::args& args, const py::kwargs& kwargs) {
  const py::object module = cupy();
  if (!module) return false;
  const py::object ndarray = module.attr("ndarray");
  for (const py::handle argument : args)
    if (py::isinstance(argument, ndarray)) return true;
  for (const auto& [name, argument] : kwargs)
    if (py::isinstance(argument, ndarray)) return true;
  return false;
}

lol_tensor CupyCall::view(const py::object& object, const char* name, bool) {
  if (!py::isinstance(object, cupy().attr("ndarray"))) refuse_type(object, name, "a CuPy array");
  const auto device = object.attr("device").attr("id").cast<int32_t>();
  if (!first_) {
    first_ = object;
    name_of_first_ = name;
    device_ = device;
  }
  if (device != device_) {
    throw py::value_error(about(name) + " is on device " + std::to_string(device) + ", " +
                          name_of_first_ + " on device " + std::to_string(device_));
  }
  return view_of(CupyArray(object), name);
}

lol_context CupyCall::context() {
  check_all_arguments_were_read();
  current_.emplace(first_.attr("device"));
  return {device_, pointer(cupy().attr("cuda").attr("get_current_stream")())};
}

py::object CupyCall::empty(const py::dtype& dtype, const std::vector<py::ssize_t>& shape,
                           const std::vector<py::ssize_t>& strides, void** data) {
  py::ssize_t bytes = dtype.itemsize();
  for (const py::ssize_t size : shape) bytes *= size;
  const py::object memory = cupy().attr("cuda").attr("alloc")(bytes);
  *data = pointer(memory);
  return cupy().attr("ndarray")(py::tuple(py::cast(shape)), dtype, memory,
                                py::tuple(py::cast(strides)));
}

void CupyCall::run(const std::function<int()>& kernel) {
  int status;
  std::exception_ptr raised;
  {
    const CatchFromLauncher caught(&raised);
    py::gil_scoped_release release;
    status = kernel();
  }
  if (raised) std::rethrow_exception(raised);
  check_status(status);
}

CupyCall::Current::Current(py::object device) : device(std::move(device)) {
  this->device.attr("__enter__")();
}

CupyCall::Current::~Current() {
  try {
    device.attr("__exit__")(py::none(), py::none(), py::none());
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("lolcats_ops: leaving a CUDA device");
  }
}

}  // namespace lolcats
