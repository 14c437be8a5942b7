#include "attention_problem.h"

namespace lol {
namespace LOL_ISA {

Problem problem_of(const lol_hybrid_attention_args& a) {
  // No more than all tokens, so that sums and multiples of the sizes stay numbers.
  const int64_t T = at_least(a.q.shape[2], 1);
  const Window window = {at_most(a.window, T), a.window_kind, at_most(a.sink, T)};
  return {a.q,           a.k,
          a.v,           a.feature_q,
          a.feature_k,   (const float*)a.gate.data,
          window,        (float)a.scale,
          a.affine != 0, true,
          0.0f};
}

Problem problem_of(const lol_linear_attention_args& a) {
  const Window window = {0, LOL_SLIDING, 0};
  return {a.q,         a.k,
          a.v,         a.feature_q,
          a.feature_k, nullptr,
          window,      (float)a.scale,
          false,       a.normalize != 0,
          (float)a.eps};
}

}  // namespace LOL_ISA
}  // namespace lol
