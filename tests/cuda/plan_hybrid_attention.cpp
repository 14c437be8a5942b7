// How hybrid_attention would be launched.
#include "attention_arguments.h"
#include "tell.h"

void run(emulator::Arguments& a) {
  auto args = hybrid_arguments(a);
  tell(a, args,
       {args.q, args.k, args.v, args.o, args.feature_q.weight, args.feature_k.weight, args.gate,
        args.m, args.den});
}
