#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
BackwardMap BackwardMap::of(const Problem& p, const FeatureMap& map, Arena& arena) {
  float* weight_t = arena.take(transposed_weight_size(p.D(), p.f()));
  transpose_weight(map, p.format, weight_t);
  return {p.in_format(map, arena), weight_t};
}

int64_t QueryBlock::floats(const Problem& p) {
  constexpr int64_t MAP = sizeof(BackwardMap) / sizeof(float);
  return 2 * (lanes_size(p.D()) + rows_size(p.D()) + lanes_size(p.V()) + rows_size(p.V())) +
         lanes_size(p.F()) + p.group() * (BackwardMap::floats(p) + MAP) + 64;
}

QueryBlock::QueryBlock(const BackwardRun& run, float* new_delta, Arena& arena)
    : run_(run), new_delta_(new_delta) {
  const Problem& p = run.p;
  q = arena.take(lanes_size(p.D()));
  q_rows = arena.take(rows_size(p.D()));
  dy = arena.take(lanes_size(p.V()));
  dy_rows = arena.take(rows_size(p.V()));
  phi = arena.take(lanes_size(p.F()));
  scratch_ = arena.take(at_least(rows_size(p.D()), rows_size(p.V())));
  maps_ = (BackwardMap*)arena.take(p.group() * (int64_t)(sizeof(BackwardMap) / sizeof(float)));
  for (int64_t g = 0; g < p.group(); g++)
    maps_[g] = BackwardMap::of(p, p.map_q(run.first_head() + g), arena);
}

void QueryBlock::load(int64_t head, int64_t position) {
  const Problem& p = run_.p;
  const BackwardProblem& b = run_.b;
  h = head;
  first = position;
  n = at_most(BLOCK, run_.s.tokens - first);
  const Tokens from = tokens_of(p.q, run_.s, h), dy_from = tokens_of(b.dy, run_.s, h);
  load_both_ways(q, q_rows, from, first, n, p.format, scratch_);
  load_both_ways(dy, dy_rows, dy_from, first, n, p.format, scratch_);
  features_forward(map().map, q, phi);
  fill(den, BLOCK, 1.0f);
  memset(by_den, 0, sizeof(by_den));
  memset(delta, 0, sizeof(delta));
  const int64_t row0 = p.statistics_of(run_.s, h);
  const Tokens y = new_delta_ ? tokens_of(b.y, run_.s, h) : Tokens{};
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = row0 + run_.s.row(first + i);
    den[i] = b.den[row];
    by_den[i] = b.dy_factor / den[i];
    if (!p.normalize) continue;
    if (new_delta_)
      new_delta_[row] = dot(dy_from.row(first + i), y.row(first + i), (int)p.V(), dy_from.dtype);
    delta[i] = run_.delta[row];
  }
}

void QueryBlock::store_delta() {
  const int64_t row0 = run_.p.statistics_of(run_.s, h);
  for (int64_t i = 0; i < n; i++) new_delta_[row0 + run_.s.row(first + i)] = delta[i];
}

void QueryBlock::prefetch(int64_t head, int64_t position) const {
  const int64_t count = at_most(BLOCK, run_.s.tokens - position);
  if (position < 0 || count <= 0) return;
  request_rows(tokens_of(run_.p.q, run_.s, head), position, count);
  request_rows(tokens_of(run_.b.dy, run_.s, head), position, count);
  if (new_delta_) request_rows(tokens_of(run_.b.y, run_.s, head), position, count);
}

}  // namespace LOL_ISA
}  // namespace lol
