// hybrid_attention (SPEC 3): y = (g sum_W e^{s - m} v + lambda sum_N phi_q phi_k v) / den,
// chunkwise, a thread or a team of them for a sequence and state head. Per token and head 2 (2 D f
// + 2 F V + w (D + V)) useful FLOPs; q, k, v are read and o written once.
#include "backward.h"
#include "forward.h"
#include "kernels.h"

namespace lol {
namespace LOL_ISA {

int hybrid_attention(const lol_hybrid_attention_args& a, const Batch& batch) {
  const Problem p = problem_of(a).by_pairs();
  const Outputs out = {a.o, (float*)a.m.data, (float*)a.den.data};
  return forward(p, batch, out, [&](const Sequence& s, int64_t state_head) {
    Run run = {};
    run.sequence = &s;
    run.state_head = state_head;
    run.k = tokens_of(a.k, s, p.kv_head_of(state_head));
    run.v = tokens_of(a.v, s, p.kv_head_of(state_head));
    run.total = s.tokens;
    return run;
  });
}

int hybrid_attention_backward(const lol_hybrid_attention_backward_args& a, const Batch& batch) {
  const lol_hybrid_attention_args& fwd = a.forward;
  BackwardProblem b(problem_of(fwd).by_pairs());
  b.dy = a.do_;
  b.y = fwd.o;
  b.den = (const float*)fwd.den.data;
  b.dq = a.dq;
  b.dk = a.dk;
  b.dv = a.dv;
  b.parameters = {a.dweight_q, a.dbias_q, a.dweight_k, a.dbias_k, (float*)a.dgate.data};
  return backward(b, batch);
}

}  // namespace LOL_ISA
}  // namespace lol
