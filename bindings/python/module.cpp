// lolcats_ops._C: the operators on arrays of NumPy or CuPy, and the switches of the C library.
#include "cuda_launcher.h"
#include "cupy_call.h"
#include "described_call.h"
#include "numpy_call.h"

using namespace lolcats;

namespace {

template <class LibraryCall>
py::object invoke(const Operator& op, const py::args& args, const py::kwargs& kwargs) {
  LibraryCall call(op.name, args, kwargs);
  op.run(call);
  return call.results();
}

void set_cpu_isa(const char* name) {
  if (lol_set_cpu_isa(name) != LOL_OK) throw py::value_error(lol_last_error());
}

py::list cpu_isas() {
  py::list names;
  for (int i = 0; i < lol_cpu_isa_count(); ++i) names.append(lol_cpu_isa_name(i));
  return names;
}

py::list cuda_launches(const std::string& name, uint32_t most_shared_bytes, py::args args) {
  for (const Operator& op : kOperators) {
    if (name != op.name) continue;
    DescribedCall call(std::move(args), most_shared_bytes);
    op.run(call);
    py::list launches;
    for (const CudaLaunch& at : call.launches())
      launches.append(py::make_tuple(at.kernel, at.blocks, at.threads, at.shared_bytes));
    return launches;
  }
  throw py::key_error(name);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() =
      "The operators of lolcats_ops on arrays of NumPy or CuPy, with the schemas of torch.ops.";
  for (const Operator& op : kOperators) {
    m.def(
        op.name,
        [&op](const py::args& args, const py::kwargs& kwargs) {
          return CupyCall::is_asked_for(args, kwargs) ? invoke<CupyCall>(op, args, kwargs)
                                                      : invoke<NumpyCall>(op, args, kwargs);
        },
        op.schema);
  }
  m.def("abi_version", &lol_abi_version, "Version of the C ABI.");
  m.def("cpu_isa", &lol_cpu_isa, "The instruction set in use.");
  m.def("cpu_isas", &cpu_isas, "The instruction sets this CPU and build can run, best first.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Use another instruction set.");
  m.def("max_threads", &lol_max_threads, "Threads that a CPU kernel uses at most.");
  m.def("has_cuda", [] { return lol_has_cuda() != 0; }, "Whether CUDA kernels were built.");
  m.def(
      "can_launch_cuda", [] { return lol_can_launch_cuda() != 0; },
      "Whether operators run on CUDA: with kernels that were built, or by a launcher.");
  m.def("cuda_launches", &cuda_launches,
        "What an operator would launch on a GPU whose blocks may have so many bytes of shared "
        "memory, (kernel, blocks, threads, bytes of shared memory) each. Arguments are in schema "
        "order, tensors (lol_dtype, shape) or None. Launches nothing and needs neither GPU nor "
        "kernels. ValueError: what the kernels cannot do.");
  m.def("set_cuda_launcher", &set_cuda_launcher, py::arg("launch"),
        "Launch CUDA kernels by launch(kernel, blocks, threads, shared_bytes, params, device, "
        "stream), in the whole process, which returns None, or why a block of the device has too "
        "little shared memory. None: by those that were built.");
}
