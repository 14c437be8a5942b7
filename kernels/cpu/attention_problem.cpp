#include "attention_problem.h"

namespace lol {
namespace LOL_ISA {
namespace {

template <class Args>
Problem problem_with(const Args& a, Window window) {
  Problem p = {};
  p.q = a.q;
  p.k = a.k;
  p.v = a.v;
  p.feature_q = a.feature_q;
  p.feature_k = a.feature_k;
  p.window = window;
  p.scale = (float)a.scale;
  p.normalize = true;
  return p;
}
template <class Args>
Problem with_softmax(const Args& a, Window window) {
  Problem p = problem_with(a, window);
  p.gate = (const float*)a.gate.data;
  p.affine = a.affine != 0;
  return p;
}

// With more, requests wait for line buffers.
constexpr int64_t MOST_LINES_AT_ONCE = 4;

}  // namespace

// By the forward pass: a backward pass has more rows and, in proportion, more work. One line at a
// time is enough for hybrid attention; linear attention has as many rows, and half of the work.
Pace Problem::pace() const {
  const int64_t maps = 1 + group();  // of the keys, and of the queries that read one state
  const auto lines_of = [&](int64_t width) { return (width * dtype_size(q.dtype) + 63) / 64; };
  const int64_t lines = maps * (lines_of(D()) + lines_of(V()));  // of a token's q, k, v and o
  const int64_t keys = gate ? window_span(window.size, window.kind) + window.sink : 0;
  // Half of a block's keys are weighed as linear, pair by pair.
  const int64_t work =
      maps * (D() * f() + F() * V()) + group() * (keys * (D() + V()) + BLOCK / 2 * (F() + V()));
  return Pace(at_most(1 + lines * multiply_adds_per_request(format) / work, MOST_LINES_AT_ONCE));
}

Problem problem_of(const lol_hybrid_attention_args& a) {
  // No more than all tokens, so that sums and multiples of the sizes stay numbers.
  const int64_t T = at_least(a.q.shape[2], 1);
  return with_softmax(a, {at_most(a.window, T), a.window_kind, at_most(a.sink, T)});
}

Problem problem_of(const lol_hybrid_attention_step_args& a) {
  return with_softmax(a, {a.window, a.window_kind, a.state.k_sink.shape[2]});
}

Problem problem_of(const lol_linear_attention_args& a) {
  Problem p = problem_with(a, {0, LOL_SLIDING, 0});
  p.normalize = a.normalize != 0;
  p.eps = (float)a.eps;
  return p;
}

}  // namespace LOL_ISA
}  // namespace lol
