// Registers torch.ops.lolcats_ops.* on the CPU and torch.ops.lolcats_ops_cuda.*, the kernels in
// CUDA C++, when the library is loaded into a process that has torch: by torch.ops.load_library, or
// by dlopen from C++. What torch.ops.lolcats_ops is for CUDA tensors is Python's choice.
#include <string>
#include <utility>

#include "stable_abi.h"
#include "torch_call.h"

namespace lolcats::torch_abi {
namespace {

template <size_t index>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  TorchCall call(stack);
  kOperators[index].run(call);
  call.return_results();
}

template <size_t... index>
bool implement(LibraryHandle library, std::index_sequence<index...>) {
  return !(torch_library_impl(library, kOperators[index].name, boxed<index>, kVersion) || ...);
}

bool register_operators(const char* name_space, const char* device) {
  LibraryHandle definitions, implementations;
  if (aoti_torch_library_init_fragment(name_space, __FILE__, __LINE__, &definitions)) return false;
  for (const Operator& op : kOperators) {
    const std::string schema = std::string(op.name) + op.schema;
    if (aoti_torch_library_def(definitions, schema.c_str())) return false;
  }
  return !aoti_torch_library_init_impl(name_space, device, __FILE__, __LINE__, &implementations) &&
         implement(implementations, std::make_index_sequence<kOperatorCount>());
}

const char* load_and_register() {
  switch (load()) {
    case Loaded::kNoTorch:
      return "no torch is loaded in this process";
    case Loaded::kTooOld:
      return "this torch is too old: 2.10 or newer is needed";
    case Loaded::kYes:
      break;
  }
  return register_operators("lolcats_ops", "CPU") && register_operators("lolcats_ops_cuda", "CUDA")
             ? nullptr
             : "torch refused the registration";
}

const char* const registration_error = load_and_register();

}  // namespace
}  // namespace lolcats::torch_abi

// Why the operators are not registered, or null if they are.
extern "C" LOL_API const char* lolcats_ops_torch_error(void) {
  return lolcats::torch_abi::registration_error;
}
