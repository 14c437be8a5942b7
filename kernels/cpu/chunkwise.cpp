#include "chunkwise.h"

namespace lol {
namespace LOL_ISA {

namespace {

// Rows of kv that are folded before they are made readable, while they still are in L1: 8 or 12 KiB
// for V = 64, and whole groups of the products' rows.
#ifdef LOL_MATRIX_UNIT
constexpr int64_t HOT_ROWS = 2 * TILE;
#else
constexpr int64_t HOT_ROWS = 48;
#endif
constexpr int64_t MAP = sizeof(FeatureMap) / sizeof(float);

}  // namespace

int64_t Chunkwise::floats(const Problem& p) {
  return KeyTiles::floats(p, KeyTiles::for_window(p)) + State::floats(p.F(), p.V()) + WEIGHTS +
         at_least(rows_size(p.D()), rows_size(p.V())) + lanes_size(p.D()) + lanes_size(p.F() + 1) +
         rows_size(p.V()) + p.group() * (p.paired_map_size() + MAP + 16) +
         (p.F() + 1) * padded(p.V()) / 2 + 2 * padded(p.V()) + 64;
}

Chunkwise::Chunkwise(const Problem& p, int64_t state_head, int64_t total, const Tokens& k,
                     const Tokens& v, Arena& arena, Along along)
    : tiles(p, KeyTiles::for_window(p), k, v, p.map_k(state_head), total, arena),
      p_(p),
      state_head_(state_head),
      along_(along) {
  state.kv = state.readable = arena.take(p.F() * padded(p.V()));
  state.ksum = arena.take(p.F());
  state.folded = p.window.sink;
  state.empty = true;
  scores = arena.take(WEIGHTS);
  row_tile = arena.take(at_least(rows_size(p.D()), rows_size(p.V())));
  q_ = arena.take(lanes_size(p.D()));
  phi_ = arena.take(lanes_size(p.F() + 1));
  sums_.y = arena.take(rows_size(p.V()));
  maps_q_ = (FeatureMap*)arena.take(p.group() * MAP);
  for (int64_t g = 0; g < p.group(); g++)
    maps_q_[g] = p.in_format(p.map_q(state_head * p.group() + g), arena);
  if (p.format == Format::f32) return;
  state.readable = arena.take((p.F() + 1) * padded(p.V()) / 2);
  if (along != Along::values) return;
  center_ = arena.take(padded(p.V()));
  row_ = arena.take(padded(p.V()));
  fill(center_, padded(p.V()), 0.0f);
}

void Chunkwise::load_state(const float* from_kv, const float* from_ksum, int64_t folded) {
  const int64_t V = p_.V(), F = p_.F(), ld = padded(V);
  for (int64_t i = 0; i < F; i++) {
    memcpy(state.kv + i * ld, from_kv + i * V, sizeof(float) * V);
    fill(state.kv + i * ld + V, ld - V, 0.0f);
  }
  memcpy(state.ksum, from_ksum, sizeof(float) * F);
  state.folded = at_least(folded, state.folded);
  state.empty = false;
  if (center_) find_center();
  keep_readable({0, F});
}

void Chunkwise::store_state(float* to_kv, float* to_ksum, Features part) const {
  const int64_t V = p_.V();
  for (int64_t i = part.begin; i < part.end; i++) {
    if (state.empty) {
      fill(to_kv + i * V, V, 0.0f);
    } else {
      memcpy(to_kv + i * V, state.kv + i * padded(V), sizeof(float) * V);
    }
    to_ksum[i] = state.empty ? 0.0f : state.ksum[i];
  }
}

void Chunkwise::fold(int64_t end, Features part, const State& to) {
  end = at_most(end, tiles.total());
  const int ld = padded(p_.V());
  const bool by_features = p_.format != Format::f32 && along_ == Along::features;
  const auto rows_of = [&](const State& of, int64_t i, bool last) {
    return StateRows{of.kv + i * ld, of.ksum + i,
                     last && by_features ? of.readable + i * ld / 2 : nullptr};
  };
  bool renewed = false;
  if (center_ && state.folded < end) {
    folds_++;
    renewed = (folds_ & (folds_ - 1)) == 0;  // 1, 2, 4, ...: until then the state nearly doubles
  }
  while (state.folded < end) {
    KeyTile& tile = tiles.at(state.folded);
    const int n = (int)at_most(tile.n, end - state.folded);
    const bool last = state.folded + n >= end;
    const Operand phi = tiles.phi_by_keys(tile);
    const Into into = state.empty ? Into::set : Into::add;
    for (int64_t i = part.begin; i < part.end; i += HOT_ROWS) {
      const Features rows = {i, at_most(i + HOT_ROWS, part.end)};
      fold_tile(p_.format, {phi.data + i * phi.row, phi.row, phi.depth}, tile.v, n,
                (int)(rows.end - i), ld, into, rows_of(state, i, false), rows_of(to, i, last));
      if (last && !by_features && !renewed) keep_readable(rows);
    }
    state = {to.kv, to.ksum, to.readable, state.folded + n, false};
  }
  if (!renewed) return;
  find_center();
  keep_readable(part);
}

void Chunkwise::keep_readable(Features part) {
  const int ld = padded(p_.V()), rows = (int)(part.end - part.begin);
  if (p_.format == Format::f32 || along_ == Along::nothing) return;
  const int64_t at = part.begin * ld;
  if (along_ == Along::features) return pair_rows(state.readable + at / 2, state.kv + at, rows, ld);
  if (!center_) return pair_columns(state.readable + at / 2, state.kv + at, rows, ld);
  for (int64_t i = part.begin; i < part.end; i++) {
    for (int j = 0; j < ld; j += LANES)
      store(row_ + j, load(state.kv + i * ld + j) - state.ksum[i] * load(center_ + j));
    pair_columns(state.readable + i * ld / 2, row_, 1, ld);
  }
}

void Chunkwise::find_center() {
  const int ld = padded(p_.V());
  float largest = 0.0f, squares = 0.0f;
  for (int64_t i = 0; i < p_.F(); i++) largest = fmaxf(largest, fabsf(state.ksum[i]));
  fill(center_, ld, 0.0f);
  if (!(largest > 0.0f)) return;
  for (int64_t i = 0; i < p_.F(); i++) {
    const float weight = state.ksum[i] / largest;  // lest squares overflow
    squares += weight * weight;
    for (int j = 0; j < ld; j += LANES)
      store(center_ + j, load(center_ + j) + weight * load(state.kv + i * ld + j));
  }
  const float scale = 1.0f / largest / squares;
  for (int j = 0; j < ld; j += LANES) store(center_ + j, scale * load(center_ + j));
}

Queries Chunkwise::load_queries(int64_t h, int64_t first, int64_t n, const Tokens& q,
                                float factor) {
  load_lanes(q_, q, first, n, p_.format, row_tile);
  const FeatureMap& map = map_q(h);
  if (!map.weight) return {first, n, q_, q_};
  if (p_.format == Format::f32) {
    features_forward(map, q_, phi_);
    for (int i = 0; factor != 1.0f && i < p_.F() * BLOCK; i += LANES)
      store(phi_ + i, factor * load(phi_ + i));
  } else {
    features_in_pairs(map, q_, factor, phi_, {phi_, nullptr});
  }
  return {first, n, q_, phi_};
}

Sums& Chunkwise::attend(const Queries& block, int64_t h) {
  const int ld = padded(p_.V()), F = (int)p_.F();
  const Term of_state = {F, transposed(block.phi, BLOCK), state.readable, ld, Skip::none, nullptr};
  gather(tiles, p_.window, block, state.folded, p_, p_.g(h), scores,
         state.empty ? nullptr : &of_state, sums_);
  if (!state.empty) add_products(p_.format, sums_.den, state.ksum, block.phi, F);
  const float factor = has_map(p_.feature_q) ? 1.0f : p_.lambda(h);
  for (int c = 0; c < BLOCK; c += LANES) {
    const Vec m = load(sums_.m + c);
    store(sums_.m + c, select(m == splat(-INFINITY), Vec{}, m));
    store(sums_.den + c, p_.normalize ? factor * load(sums_.den + c) + p_.eps : splat(1.0f));
  }
  if (p_.normalize || factor != 1.0f) normalize(sums_, block.n, (int)p_.V(), factor);
  return sums_;
}

}  // namespace LOL_ISA
}  // namespace lol
