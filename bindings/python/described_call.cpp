#include "described_call.h"

#include <pybind11/stl.h>

namespace lolcats {
namespace {

// The tensor somewhere, nobody reads where: kernels differ in what alignment they need, and an
// empty tensor has no data.
lol_tensor located(lol_tensor t) {
  bool empty = false;
  for (int i = 0; i < t.ndim; ++i) empty |= t.shape[i] == 0;
  t.data = empty ? nullptr : reinterpret_cast<void*>(uintptr_t{256});
  return t;
}

}  // namespace

lol_tensor DescribedCall::described(const py::object& object) {
  const auto [dtype, shape] = object.cast<std::pair<int32_t, std::vector<int64_t>>>();
  if (shape.size() > 4) throw py::value_error("a described tensor has more than 4 dimensions");
  lol_tensor t{nullptr, dtype, static_cast<int32_t>(shape.size())};
  int64_t step = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.stride[i] = step;
    step *= shape[i];
  }
  return located(t);
}

lol_tensor DescribedCall::optional_tensor(const char*) {
  const py::object object = next();
  return object.is_none() ? lol_tensor{} : described(object);
}

lol_tensor DescribedCall::result(const lol_tensor& like) { return located(like); }

int DescribedCall::note(const lol_cuda_launch* launch, void* call) {
  auto& self = *static_cast<DescribedCall*>(call);
  if (launch->shared_bytes > self.most_shared_bytes_) {
    const std::string needed = std::to_string(launch->shared_bytes),
                      there = std::to_string(self.most_shared_bytes_);
    lol_set_last_error((launch->kernel + (": a block needs " + needed) +
                        " bytes of shared memory, on this GPU it has " + there)
                           .c_str());
    return LOL_EUNSUPPORTED;
  }
  self.launches_.push_back({launch->kernel, launch->blocks, launch->threads, launch->shared_bytes});
  return LOL_OK;
}

void DescribedCall::run(const std::function<int()>& kernel) {
  lol_set_thread_cuda_launcher(note, this);
  const int status = kernel();
  lol_set_thread_cuda_launcher(nullptr, nullptr);
  if (status != LOL_OK) throw py::value_error(lol_last_error());
}

}  // namespace lolcats
