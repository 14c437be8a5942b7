// A Python function as the launcher of the C library.
#pragma once
#include <pybind11/pybind11.h>

#include <exception>

namespace lolcats {

// launch(kernel, blocks, threads, shared_bytes, params, device, stream), of the types str, int and,
// for params, bytes; None for the library's own launcher. It returns None, or the reason of
// LOL_EUNSUPPORTED; what it raises is that of LOL_ECUDA.
void set_cuda_launcher(const pybind11::object& launch);

// While it lives, what the launcher raises in this thread is put where the caller finds it.
class CatchFromLauncher {
 public:
  explicit CatchFromLauncher(std::exception_ptr* raised);
  CatchFromLauncher(const CatchFromLauncher&) = delete;
  ~CatchFromLauncher();

 private:
  std::exception_ptr* outer_;
};

}  // namespace lolcats
