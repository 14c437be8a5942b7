// linear_attention (SPEC 4): the hybrid without a window. y = scale phi_q kv / (scale phi_q ksum +
// eps), with fused or no feature maps, initial and final state. Per token and head 2 (2 D f + 2 F
// V) useful FLOPs.
#include "backward.h"
#include "kernels.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {

int linear_attention(const lol_linear_attention_args& a, const Batch& batch) {
  const Problem p = problem_of(a).by_pairs();
  float* den = (float*)a.den.data;
  return run_workers(
      batch.count * p.state_heads(), Chunkwise::floats(p), p.work(batch.real_tokens),
      [&](int64_t w, Arena arena) {
        const Sequence& s = batch.sequences[w / p.state_heads()];
        const int64_t state_head = w % p.state_heads(), kv_head = p.kv_head_of(state_head);
        const int64_t at = s.slot * p.state_heads() + state_head, F = p.F();
        Chunkwise c(p, state_head, s.tokens, tokens_of(a.k, s, kv_head), tokens_of(a.v, s, kv_head),
                    arena);
        if (a.kv0.data)
          c.load_state((const float*)a.kv0.data + at * F * p.V(),
                       (const float*)a.ksum0.data + at * F, 0);
        const FinalState final = {s.tokens, (float*)a.kv.data + at * F * p.V(),
                                  (float*)a.ksum.data + at * F};
        forward_worker(p, s, state_head, c, 0, a.o, nullptr, den, &final);
      },
      [&] { clear_padding(batch, a.o, nullptr, den); });
}

int linear_attention_backward(const lol_linear_attention_backward_args& a, const Batch& batch) {
  const lol_linear_attention_args& fwd = a.forward;
  BackwardProblem b(problem_of(fwd));
  b.dy = a.do_;
  b.y = fwd.o;
  b.den = (const float*)fwd.den.data;
  b.kv0 = (const float*)fwd.kv0.data;
  b.ksum0 = (const float*)fwd.ksum0.data;
  b.dkv = (const float*)a.dkv.data;
  b.dksum = (const float*)a.dksum.data;
  b.dq = a.dq;
  b.dk = a.dk;
  b.dv = a.dv;
  b.parameters = {a.dweight_q, a.dbias_q, a.dweight_k, a.dbias_k, nullptr};
  b.dkv0 = (float*)a.dkv0.data;
  b.dksum0 = (float*)a.dksum0.data;
  return backward(b, batch);
}

}  // namespace LOL_ISA
}  // namespace lol
