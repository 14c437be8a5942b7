// How hybrid_attention_step_ would be launched.
#include "step_arguments.h"
#include "tell.h"

void run(emulator::Arguments& a) {
  lol_hybrid_attention_step_args args = step_arguments(a);
  args.q = tensor_of(a, "q");
  args.k = tensor_of(a, "k");
  args.v = tensor_of(a, "v");
  args.o = tensor_of(a, "o");
  const lol_state& s = args.state;
  tell(a, args,
       {args.q, args.k, args.v, args.o, args.feature_q.weight, args.feature_k.weight, args.gate,
        s.kv, s.ksum, s.k_ring, s.v_ring, s.length, s.folded});
}
