#include "chunkwise.h"

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

// The tiles of a window, one more for the tile being folded and those of the sinks. Past
// MOST_TILES, wide windows load tiles again: a load costs a few per cent of the products of a tile
// pair, while more tiles would push the state out of L2.
int KeyTiles::for_window(const Problem& p) {
  const int64_t span = p.window.size * (p.window.kind == LOL_TERRACE ? 2 : 1) + BLOCK - 1;
  return (int)at_most(span / BLOCK + 2 + (p.window.sink + BLOCK - 1) / BLOCK, MOST_TILES);
}

int64_t KeyTiles::floats(const Problem& p, int count) {
  return count * tile_floats(p) + at_least(rows_size(p.D()), rows_size(p.V())) +
         lanes_size(p.F() + 1) + p.paired_map_size() + LANES;
}

int64_t KeyTiles::tile_floats(const Problem& p) {
  return lanes_size(p.D()) + rows_size(p.V()) + lanes_size(p.F() + 1) +
         (p.both_ways ? rows_size(p.D()) + lanes_size(p.V()) : 0);
}

KeyTile KeyTiles::make_tile(const Problem& p, Arena& arena) {
  KeyTile tile = {};
  tile.start = -1;
  tile.keys = arena.take(lanes_size(p.D()));
  tile.v = arena.take(rows_size(p.V()));
  tile.phi = arena.take(lanes_size(p.F() + 1));
  if (p.both_ways) tile.k_rows = arena.take(rows_size(p.D()));
  if (p.both_ways && p.format != Format::f32) tile.v_lanes = arena.take(lanes_size(p.V()));
  return tile;
}

KeyTiles::KeyTiles(const Problem& p, int count, const Tokens& k, const Tokens& v,
                   const FeatureMap& map, int64_t total, Arena& arena)
    : k_(k),
      v_(v),
      map_(map),
      format_(p.format),
      total_(total),
      sinks_(p.window.sink),
      count_(count) {
  for (int i = 0; i < count_; i++) tiles_[i] = make_tile(p, arena);
  row_tile_ = arena.take(at_least(rows_size(p.D()), rows_size(p.V())));
  if (format_ == Format::f32) return;
  phi_ = arena.take(lanes_size(p.F() + 1));
  map_ = with_paired_weight(map, arena.take(p.paired_map_size()), p.weight_parts);
}

KeyTile& KeyTiles::find(int64_t start, int64_t end, bool sink) {
  const int64_t past_first = start - first_held_;
  if (!sink && past_first >= 0 && past_first % BLOCK == 0 && past_first / BLOCK < held_count_)
    return held_[past_first / BLOCK];
  int slot = 0;
  clock_++;
  for (int i = 0; i < count_; i++) {
    KeyTile& tile = tiles_[i];
    if (tile.start == start && tile.sink == sink) {
      tile.used = clock_;
      return tile;
    }
    if (tile.used < tiles_[slot].used) slot = i;
  }
  KeyTile& tile = tiles_[slot];
  load(tile, start, end, sink);
  tile.used = clock_;
  return tile;
}

void KeyTiles::load(KeyTile& tile, int64_t start, int64_t end, bool sink) {
  tile.start = start;
  tile.n = at_most(BLOCK, end - start);
  tile.sink = sink;
  tile.has_phi = false;
  load_values(tile.v, v_, start, tile.n, format_, sink);
  if (!tile.k_rows) {
    load_lanes(tile.keys, k_, start, tile.n, format_, row_tile_, sink);
  } else {
    load_both_ways(tile.keys, tile.k_rows, k_, start, tile.n, format_, row_tile_, sink);
    if (tile.v_lanes) load_lanes(tile.v_lanes, v_, start, tile.n, format_, row_tile_, sink);
  }
  if (sink) return;  // hardly ever more than one tile
  const int64_t ahead = at_most(BLOCK, end - start - tile.n);
  request_rows(k_, start + tile.n, ahead);
  request_rows(v_, start + tile.n, ahead);
}

const float* KeyTiles::phi(KeyTile& tile) {
  if (!map_.weight) return tile.keys;
  if (tile.has_phi) return tile.phi;
  tile.has_phi = true;
  if (format_ == Format::f32) {
    features_forward(map_, tile.keys, tile.phi);
  } else {
    float* along_tokens = tile.phi + words(format_, map_.F) * BLOCK;
    features_in_pairs(map_, tile.keys, 1.0f, phi_, {tile.phi, along_tokens});
  }
  return tile.phi;
}

Operand KeyTiles::phi_by_keys(KeyTile& tile) {
  const float* of = phi(tile);
  if (format_ == Format::f32) return rows(of, BLOCK);
  return rows(of + words(format_, map_.F) * BLOCK, BLOCK / 2);
}

Operand KeyTiles::values(const KeyTile& tile) const {
  return tile.v_lanes ? transposed(tile.v_lanes, BLOCK) : rows(tile.v, padded(v_.width));
}

Pieces::Pieces(KeyTiles& tiles, const Window& window, const Queries& block, int64_t from)
    : tiles_(tiles), starts_(window, block.first, block.n), block_(block), from_(from) {
  sinks_ = at_most(window.sink, block.first + block.n);
  restart();
}

void Pieces::restart() {
  const int64_t last = block_.first + block_.n - 1;
  sink_ = 0;
  position_ = from_ <= last ? from_ + (last - from_) / BLOCK * BLOCK : from_ - 1;
}

int Pieces::next(WeightTile* piece, float* weights, int D) {
  int count = 0;
  while (count < tiles_.count() && more()) {
    const bool sink = sink_ < sinks_;
    int64_t& position = sink ? sink_ : position_;
    WeightTile& w = piece[count];
    w.tile = sink ? &tiles_.sinks_at(position) : &tiles_.at(position);
    w.softmax = (sink ? causal_band : softmax_band)(starts_, position, w.tile->n);
    w.linear = sink ? Band{} : linear_band(starts_, position, w.tile->n);
    w.weights = weights + count * BLOCK * BLOCK;
    position += sink ? BLOCK : -BLOCK;
    count++;
    if (w.softmax.empty()) continue;
    gemm(tiles_.format(), (int)w.tile->n, BLOCK, D, transposed(w.tile->keys, BLOCK), block_.q,
         BLOCK, w.weights, BLOCK, Into::set, Skip::outputs, &w.softmax);
  }
  return count;
}

namespace {

// Products q . k become g e^{s - m}, zero outside the band; den and `rescale`, the factor of
// earlier sums, follow the maximum. Weights that are still to be rounded are not in den yet.
template <Format format>
void softmax_weights(const WeightTile* piece, int count, float scale, float g, Sums& out,
                     float* rescale) {
  for (int c = 0; c < BLOCK; c += LANES) {
    const Vec before = load(out.m + c);
    Vec m = before;
    for (int t = 0; t < count; t++) {
      for_band(piece[t].softmax, c, [&](int j, auto keep) {
        m = max(m, keep(scale * load(piece[t].weights + j * BLOCK + c), splat(-INFINITY)));
      });
    }
    // A query with no key so far keeps m = -inf; shifting by 0 instead keeps its (all masked)
    // exponentials finite.
    const Vec shift = select(m == splat(-INFINITY), Vec{}, m);
    const Vec factor = select(m == before, splat(1.0f), exp_below_one(before - shift));
    Vec den = factor * load(out.den + c);
    for (int t = 0; t < count; t++) {
      clear_outside(piece[t].weights, piece[t].softmax, c, piece[t].tile->n);
      for_band(piece[t].softmax, c, [&](int j, auto keep) {
        float* w = piece[t].weights + j * BLOCK + c;
        const Vec e = keep(g * exp_below_one_for<format>(scale * load(w) - shift));
        if (format == Format::f32) den += e;
        store(w, e);
      });
    }
    store(out.m + c, m);
    store(out.den + c, den);
    store(rescale + c, factor);
  }
}

template <Format format>
void linear_weights(KeyTiles& tiles, const WeightTile& w, const Queries& block, int F,
                    float* scores, Sums& out) {
  gemm(format, (int)w.tile->n, BLOCK, F, transposed(tiles.phi(*w.tile), BLOCK), block.phi, BLOCK,
       scores, BLOCK, Into::set, Skip::outputs, &w.linear);
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec den = load(out.den + c);
    for_band(w.linear, c, [&](int j, auto keep) {
      const Vec l = keep(load(scores + j * BLOCK + c));
      float* to = w.weights + j * BLOCK + c;
      if (format == Format::f32) den += l;
      store(to, load(to) + l);
    });
    store(out.den + c, den);
  }
}

// Weights of a tile become pairs, and den takes them as they were rounded: as the values are
// weighed.
void round_weights(const WeightTile& w, Sums& out) {
#ifdef LOL_PAIRS
  const int n = (int)w.tile->n, words_of_keys = words(Format::bf16_pairs, n);
  pair_rows(w.weights, w.weights, n, BLOCK);
  const Vec ones = pair(splat(1.0f), splat(1.0f));
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec even = load(out.den + c), odd = {};
    int i = 0;
    for (; i + 1 < words_of_keys; i += 2) {
      even = add_dot(even, load(w.weights + i * BLOCK + c), ones);
      odd = add_dot(odd, load(w.weights + (i + 1) * BLOCK + c), ones);
    }
    if (i < words_of_keys) even = add_dot(even, load(w.weights + i * BLOCK + c), ones);
    store(out.den + c, even + odd);
  }
#else
  (void)w, (void)out;
#endif
}

// The keys that a query sees either way: linear ones are the older.
Band seen(const WeightTile& w) {
  Band band;
  for (int c = 0; c < BLOCK; c++) {
    band.lo[c] = w.linear.lo[c] < w.linear.hi[c] ? w.linear.lo[c] : w.softmax.lo[c];
    band.hi[c] = w.softmax.lo[c] < w.softmax.hi[c] ? w.softmax.hi[c] : w.linear.hi[c];
  }
  return band;
}

template <Format format>
void gather_as(KeyTiles& tiles, const Window& window, const Queries& block, int64_t from,
               const Problem& p, float g, float* weights, const Term* state, Sums& out) {
  const int ld = padded(p.V());
  fill(out.m, BLOCK, -INFINITY);
  memset(out.den, 0, sizeof(out.den));
  Pieces pieces(tiles, window, block, from);
  WeightTile piece[MOST_TILES];
  Band bands[MOST_TILES];
  static_assert(MOST_TILES + 1 <= MOST_TERMS, "all tiles and the state are terms of one product");
  Term terms[MOST_TERMS];
  Into into = Into::set;
  do {  // once at least: all keys may be in the state, which is then there
    const int count = pieces.next(piece, weights, (int)p.D());
    float rescale[BLOCK];
    softmax_weights<format>(piece, count, p.scale, g, out, rescale);
    for (int64_t i = 0; into == Into::add && i < block.n; i++) {
      for (int j = 0; j < ld; j += LANES)
        store(out.y + i * ld + j, rescale[i] * load(out.y + i * ld + j));
    }
    for (int t = 0; t < count; t++) {
      const int n = (int)piece[t].tile->n;
      if (!piece[t].linear.empty())
        linear_weights<format>(tiles, piece[t], block, (int)p.F(),
                               weights + MOST_TILES * BLOCK * BLOCK, out);
      if (format != Format::f32) round_weights(piece[t], out);
      bands[t] = seen(piece[t]);
      terms[t] = {
          n, transposed(piece[t].weights, BLOCK), piece[t].tile->v, ld, Skip::keys_of_m, &bands[t]};
    }
    const bool with_state = state && !pieces.more();
    if (with_state) terms[count] = *state;
    gemm(format, (int)block.n, ld, terms, count + with_state, out.y, ld, into);
    into = Into::add;
  } while (pieces.more());
}

}  // namespace

void gather(KeyTiles& tiles, const Window& window, const Queries& block, int64_t from,
            const Problem& p, float g, float* weights, const Term* state, Sums& out) {
  const auto run =
      tiles.format() == Format::f32 ? gather_as<Format::f32> : gather_as<Format::bf16_pairs>;
  run(tiles, window, block, from, p, g, weights, state, out);
}

void normalize(Sums& sums, int64_t n, int V) {
  const int ld = padded(V);
  float *y = sums.y, factors[BLOCK];
  for (int c = 0; c < BLOCK; c += LANES) store(factors + c, 1.0f / load(sums.den + c));
  for (int64_t i = 0; i < n; i++, y += ld) {
    for (int j = 0; j < ld; j += LANES) store(y + j, factors[i] * load(y + j));
  }
}

int64_t Chunkwise::floats(const Problem& p) {
  return KeyTiles::floats(p, KeyTiles::for_window(p)) + State::floats(p.F(), p.V()) + WEIGHTS +
         at_least(rows_size(p.D()), rows_size(p.V())) + lanes_size(p.D()) + lanes_size(p.F() + 1) +
         rows_size(p.V()) + p.group() * p.paired_map_size() + (p.F() + 1) * padded(p.V()) / 2 + 64;
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
  if (p.format == Format::f32) return;
  weights_q_ = arena.take(p.group() * p.paired_map_size());
  for (int64_t g = 0; g < p.group(); g++)
    with_paired_weight(p.map_q(state_head * p.group() + g), weights_q_ + g * p.paired_map_size(),
                       p.weight_parts);
  state.readable = arena.take((p.F() + 1) * padded(p.V()) / 2);
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

// Rows of kv that are folded before they are made readable, while they still are in L1: 8 or 12 KiB
// for V = 64, and whole groups of the products' rows.
#ifdef LOL_MATRIX_UNIT
constexpr int64_t HOT_ROWS = 2 * TILE;
#else
constexpr int64_t HOT_ROWS = 48;
#endif

void Chunkwise::fold(int64_t end, Features part) {
  end = at_most(end, tiles.total());
  const int ld = padded(p_.V());
  while (state.folded < end) {
    KeyTile& tile = tiles.at(state.folded);
    const int n = (int)at_most(tile.n, end - state.folded);
    const Operand phi = tiles.phi_by_keys(tile);
    const Into into = state.empty ? Into::set : Into::add;
    for (int64_t i = part.begin; i < part.end; i += HOT_ROWS) {
      const Features rows = {i, at_most(i + HOT_ROWS, part.end)};
      fold_tile(p_.format, {phi.data + i * phi.row, phi.row, phi.depth}, tile.v, n,
                (int)(rows.end - i), ld, state.kv + i * ld, state.ksum + i, into);
      if (state.folded + n >= end) keep_readable(rows);
    }
    state.empty = false;
    state.folded += n;
  }
}

void Chunkwise::keep_readable(Features part) {
  const int ld = padded(p_.V()), rows = (int)(part.end - part.begin);
  if (p_.format == Format::f32 || along_ == Along::nothing) return;
  const int64_t at = part.begin * ld;
  if (along_ == Along::features) {
    pair_rows(state.readable + at / 2, state.kv + at, rows, ld);
  } else {
    pair_columns(state.readable + at / 2, state.kv + at, rows, ld);
  }
}

FeatureMap Chunkwise::map_q(int64_t h) const {
  FeatureMap map = p_.map_q(h);
  if (p_.format != Format::f32) {
    map.weight = weights_q_ + (h - state_head_ * p_.group()) * p_.paired_map_size();
    map.format = p_.format;
    map.parts = p_.weight_parts;
  }
  return map;
}

Queries Chunkwise::load_queries(int64_t h, int64_t first, int64_t n, const Tokens& q,
                                float factor) {
  load_lanes(q_, q, first, n, p_.format, row_tile);
  const FeatureMap map = map_q(h);
  if (!map.weight && factor == 1.0f) return {first, n, q_, q_};
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
  for (int c = 0; c < BLOCK; c += LANES) {
    const Vec m = load(sums_.m + c);
    store(sums_.m + c, select(m == splat(-INFINITY), Vec{}, m));
    store(sums_.den + c, p_.normalize ? load(sums_.den + c) + p_.eps : splat(1.0f));
  }
  if (p_.normalize) normalize(sums_, block.n, (int)p_.V());
  return sums_;
}

}  // namespace LOL_ISA
}  // namespace lol
