#include "cuda_launcher.h"

#include "lolcats_ops/lolcats_ops.h"

namespace lolcats {
namespace {

namespace py = pybind11;

thread_local std::exception_ptr* where_to_put = nullptr;

int launch_in_python(const lol_cuda_launch* launch, void* function) {
  const py::gil_scoped_acquire gil;
  try {
    const py::object too_small = py::handle(static_cast<PyObject*>(function))(
        launch->kernel, launch->blocks, launch->threads, launch->shared_bytes,
        py::bytes(static_cast<const char*>(launch->params), launch->params_size),
        launch->context.device, reinterpret_cast<uintptr_t>(launch->context.stream));
    if (too_small.is_none()) return LOL_OK;
    lol_set_last_error(too_small.cast<std::string>().c_str());
    return LOL_EUNSUPPORTED;
  } catch (const std::exception& error) {
    lol_set_last_error(error.what());
    if (where_to_put) *where_to_put = std::current_exception();
    return LOL_ECUDA;
  }
}

}  // namespace

void set_cuda_launcher(const py::object& launch) {
  if (launch.is_none()) return lol_set_cuda_launcher(nullptr, nullptr);
  // Never released: a thread may be calling it.
  lol_set_cuda_launcher(launch_in_python, launch.inc_ref().ptr());
}

CatchFromLauncher::CatchFromLauncher(std::exception_ptr* raised) : outer_(where_to_put) {
  where_to_put = raised;
}
CatchFromLauncher::~CatchFromLauncher() { where_to_put = outer_; }

}  // namespace lolcats
