// linear_attention (SPEC 4): the hybrid without a window. y = scale phi_q kv / (scale phi_q ksum +
// eps), with fused or no feature maps, initial and final state. Per token and head 2 (2 D f + 2 F
// V) useful FLOPs.
#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace lol {
namespace LOL_ISA {

int linear_attention(const lol_linear_attention_args& a, const Batch& batch) {
  const Problem p = problem_of(a).by_pairs();
  const Outputs out = {a.o, nullptr, (float*)a.den.data};
  return forward(p, batch, out, [&](const Sequence& s, int64_t state_head) {
    const int64_t at = s.slot * p.state_heads() + state_head, F = p.F(), V = p.V();
    Run run = {};
    run.sequence = &s;
    run.state_head = state_head;
    run.k = tokens_of(a.k, s, p.kv_head_of(state_head));
    run.v = tokens_of(a.v, s, p.kv_head_of(state_head));
    run.total = run.fold = s.tokens;
    if (a.kv0.data) {
      run.kv = (const float*)a.kv0.data + at * F * V;
      run.ksum = (const float*)a.ksum0.data + at * F;
    }
    run.final_kv = (float*)a.kv.data + at * F * V;
    run.final_ksum = (float*)a.ksum.data + at * F;
    return run;
  });
}

int linear_attention_backward(const lol_linear_attention_backward_args& a, const Batch& batch) {
  const lol_linear_attention_args& fwd = a.forward;
  BackwardProblem b(problem_of(fwd).by_pairs());
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
