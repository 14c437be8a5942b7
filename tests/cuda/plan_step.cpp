// Tells how a call would be launched, instead of launching it, and where the tensors are, so that
// their addresses are found in the params.
#include "step_arguments.h"

static emulator::Arguments* arguments;

static int tell(const lol_cuda_launch* launch, void*) {
  const int64_t numbers[] = {launch->blocks, launch->threads, launch->shared_bytes,
                             static_cast<int64_t>(launch->params_size)};
  std::memcpy(arguments->tensor<int64_t>("launch"), numbers, sizeof numbers);
  std::memcpy(arguments->tensor<char>("params"), launch->params, launch->params_size);
  std::strcpy(arguments->tensor<char>("kernel"), launch->kernel);
  return LOL_OK;
}

void run(emulator::Arguments& a) {
  arguments = &a;
  lol_hybrid_attention_step_args args = step_arguments(a);
  args.q = tensor_of(a, "q");
  args.k = tensor_of(a, "k");
  args.v = tensor_of(a, "v");
  args.o = tensor_of(a, "o");
  const lol_tensor all[] = {args.q,
                            args.k,
                            args.v,
                            args.o,
                            args.feature_q.weight,
                            args.feature_k.weight,
                            args.gate,
                            args.state.kv,
                            args.state.ksum,
                            args.state.k_ring,
                            args.state.v_ring,
                            args.state.length,
                            args.state.folded};
  int64_t* addresses = a.tensor<int64_t>("addresses");
  for (const lol_tensor& t : all) *addresses++ = reinterpret_cast<int64_t>(t.data);
  args.struct_size = sizeof args;
  args.context.device = 0;
  lol_set_cuda_launcher(tell, nullptr);
  if (lol::check(args) || lol::cuda::run(args)) std::abort();
}
