#include "chunkwise.h"

namespace lol {
namespace LOL_ISA {

Problem problem_of(const lol_hybrid_attention_args& a) {
  const Window window = {a.window, a.window_kind, a.sink};
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
  return count * (lanes_size(p.D()) + rows_size(p.V()) + lanes_size(p.F())) + rows_size(p.D());
}

KeyTiles::KeyTiles(const Problem& p, int count, const Tokens& k, const Tokens& v,
                   const FeatureMap& map, int64_t total, Arena& arena)
    : k_(k), v_(v), map_(map), total_(total), sinks_(p.window.sink), count_(count) {
  for (int i = 0; i < count_; i++) {
    keys_[i] = arena.take(lanes_size(p.D()));
    values_[i] = arena.take(rows_size(p.V()));
    tiles_[i] = {-1, 0, false, keys_[i], values_[i], arena.take(lanes_size(p.F())), false, 0};
  }
  row_tile_ = arena.take(rows_size(p.D()));
}

KeyTile& KeyTiles::find(int64_t start, int64_t end, bool sink) {
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
  tile.start = start;
  tile.n = at_most(BLOCK, end - start);
  tile.sink = sink;
  tile.has_phi = false;
  tile.used = clock_;
  load_rows(row_tile_, k_, start, tile.n, sink);
  to_lanes(keys_[slot], row_tile_, k_.width);
  load_rows(values_[slot], v_, start, tile.n, sink);
  return tile;
}

const float* KeyTiles::phi(KeyTile& tile) {
  if (!tile.has_phi) features_forward(map_, tile.keys, tile.phi);
  tile.has_phi = true;
  return tile.phi;
}

WindowPieces::WindowPieces(KeyTiles& tiles, const Window& window, const Queries& block)
    : tiles_(tiles),
      window_(window),
      block_(block),
      sink_(0),
      position_(window.start(block.first)),
      end_(block.first + block.n) {
  if (window.size == 0) position_ = end_;
}

int WindowPieces::next(WindowTile* piece, float* scores, int D, float scale) {
  int count = 0;
  const int64_t sinks = at_most(window_.sink, end_);
  while (count < tiles_.count() && more()) {
    const bool sink = sink_ < sinks;
    int64_t& position = sink ? sink_ : position_;
    WindowTile& w = piece[count];
    w.tile = sink ? &tiles_.sinks_at(position) : &tiles_.at(position);
    w.band = sink ? causal_band(position, w.tile->n, block_.first, block_.n)
                  : softmax_band(window_, position, w.tile->n, block_.first, block_.n);
    w.scores = scores + count * BLOCK * BLOCK;
    gemm((int)w.tile->n, BLOCK, D, transposed(w.tile->keys, BLOCK), block_.q, BLOCK, w.scores,
         BLOCK, Into::set, Skip::outputs, &w.band);
    for (int64_t i = 0; i < w.tile->n * BLOCK; i += LANES)
      store(w.scores + i, scale * load(w.scores + i));
    position += BLOCK;
    count++;
  }
  return count;
}

void attend_softmax(KeyTiles& tiles, const Window& window, const Queries& block, int D, int V,
                    float scale, float* scores, SoftmaxSums& out) {
  fill(out.m, BLOCK, -INFINITY);
  memset(out.sum, 0, sizeof(out.sum));
  memset(out.o, 0, sizeof(float) * V * BLOCK);
  WindowPieces pieces(tiles, window, block);
  WindowTile piece[MOST_TILES];
  for (bool first = true; int count = pieces.next(piece, scores, D, scale); first = false) {
    for (int c = 0; c < BLOCK; c += LANES) {
      Vec m = load(out.m + c);
      for (int t = 0; t < count; t++) {
        const Band& band = piece[t].band;
        for (int j = band.lo[c]; j < band.hi[c + LANES - 1]; j++) {
          m = max(m, select(in_band(band, c, j), load(piece[t].scores + j * BLOCK + c),
                            splat(-INFINITY)));
        }
      }
      // A query with no key so far keeps m = -inf; shifting by 0 instead keeps its (all masked)
      // exponentials finite.
      const Vec shift = select(m == splat(-INFINITY), Vec{}, m);
      Vec sum = load(out.sum + c);
      if (!first) {
        const Vec correction = exp(load(out.m + c) - shift);
        sum *= correction;
        for (int i = 0; i < V; i++)
          store(out.o + i * BLOCK + c, correction * load(out.o + i * BLOCK + c));
      }
      for (int t = 0; t < count; t++) {
        const Band& band = piece[t].band;
        for (int j = 0; j < piece[t].tile->n; j++) {
          float* s = piece[t].scores + j * BLOCK + c;
          if (j < band.lo[c] || j >= band.hi[c + LANES - 1]) {
            store(s, Vec{});
            continue;
          }
          const Vec e = select(in_band(band, c, j), exp(load(s) - shift), Vec{});
          sum += e;
          store(s, e);
        }
      }
      store(out.m + c, m);
      store(out.sum + c, sum);
    }
    for (int t = 0; t < count; t++) {
      gemm(V, BLOCK, (int)piece[t].tile->n, transposed(piece[t].tile->v, padded(V)),
           piece[t].scores, BLOCK, out.o, BLOCK, Into::add, Skip::depth_keys, &piece[t].band);
    }
  }
}

void linear_scores(KeyTiles& tiles, KeyTile& tile, const Queries& block, int F, const Band& band,
                   float* scores) {
  gemm((int)tile.n, BLOCK, F, transposed(tiles.phi(tile), BLOCK), block.phi, BLOCK, scores, BLOCK,
       Into::set, Skip::outputs, &band);
  keep_band(scores, band, tile.n);
}

int64_t Chunkwise::floats(const Problem& p) {
  return KeyTiles::floats(p, KeyTiles::for_window(p)) + p.F() * padded(p.V()) + p.F() +
         MOST_TILES * BLOCK * BLOCK + BLOCK * padded(p.D()) + BLOCK * padded(p.V()) +
         lanes_size(p.D()) + lanes_size(p.F()) + 2 * lanes_size(p.V()) + 256;
}

Chunkwise::Chunkwise(const Problem& p, int64_t state_head, int64_t total, const Tokens& k,
                     const Tokens& v, Arena& arena)
    : tiles(p, KeyTiles::for_window(p), k, v, p.map_k(state_head), total, arena),
      p_(p),
      folded_(p.window.sink) {
  kv = arena.take(p.F() * padded(p.V()));
  ksum = arena.take(p.F());
  scores = arena.take(MOST_TILES * BLOCK * BLOCK);
  row_tile = arena.take(at_least(rows_size(p.D()), rows_size(p.V())));
  q_ = arena.take(lanes_size(p.D()));
  phi_ = arena.take(lanes_size(p.F()));
  o_linear_ = arena.take(lanes_size(p.V()));
  softmax_.o = arena.take(lanes_size(p.V()));
}

void Chunkwise::load_state(const float* from_kv, const float* from_ksum, int64_t folded) {
  const int64_t V = p_.V(), F = p_.F(), ld = padded(V);
  for (int64_t i = 0; i < F; i++) {
    memcpy(kv + i * ld, from_kv + i * V, sizeof(float) * V);
    fill(kv + i * ld + V, ld - V, 0.0f);
  }
  memcpy(ksum, from_ksum, sizeof(float) * F);
  folded_ = at_least(folded, folded_);
  has_state_ = true;
}

void Chunkwise::store_state(float* to_kv, float* to_ksum) const {
  const int64_t V = p_.V(), F = p_.F();
  if (!has_state_) {
    memset(to_kv, 0, sizeof(float) * F * V);
    memset(to_ksum, 0, sizeof(float) * F);
    return;
  }
  for (int64_t i = 0; i < F; i++) memcpy(to_kv + i * V, kv + i * padded(V), sizeof(float) * V);
  memcpy(to_ksum, ksum, sizeof(float) * F);
}

void Chunkwise::fold(int64_t end) {
  end = at_most(end, tiles.total());
  const int F = (int)p_.F(), ld = padded(p_.V());
  while (folded_ < end) {
    KeyTile& tile = tiles.at(folded_);
    const int n = (int)at_most(tile.n, end - folded_);
    const float* phi = tiles.phi(tile);
    gemm(F, ld, n, rows(phi, BLOCK), tile.v, ld, kv, ld, has_state_ ? Into::add : Into::set);
    for (int i = 0; i < F; i++) {
      float sum = 0.0f;
      for (int j = 0; j < n; j++) sum += phi[i * BLOCK + j];
      ksum[i] = has_state_ ? ksum[i] + sum : sum;
    }
    has_state_ = true;
    folded_ += n;
  }
}

Queries Chunkwise::load_queries(int64_t h, int64_t first, int64_t n, const Tokens& q) {
  load_rows(row_tile, q, first, n);
  to_lanes(q_, row_tile, q.width);
  features_forward(p_.map_q(h), q_, phi_);
  return {first, n, q_, phi_};
}

const float* Chunkwise::attend(const Queries& block, int64_t h, float* m, float* den) {
  const int V = (int)p_.V(), F = (int)p_.F();
  if (has_state_) {
    gemm(V, BLOCK, F, transposed(kv, padded(V)), block.phi, BLOCK, o_linear_, BLOCK, Into::set);
    gemm(1, BLOCK, F, rows(ksum, F), block.phi, BLOCK, den, BLOCK, Into::set);
  } else {
    memset(o_linear_, 0, sizeof(float) * V * BLOCK);
    memset(den, 0, sizeof(float) * BLOCK);
  }
  const int64_t linear_end = p_.window.start(block.first + block.n - 1);
  for (int64_t start = folded_; start < linear_end; start += BLOCK) {
    KeyTile& tile = tiles.at(start);
    const Band band = linear_band(p_.window, start, tile.n, block.first, block.n);
    linear_scores(tiles, tile, block, F, band, scores);
    for (int c = 0; c < BLOCK; c += LANES) {
      Vec sum = load(den + c);
      for (int j = 0; j < tile.n; j++) sum += load(scores + j * BLOCK + c);
      store(den + c, sum);
    }
    gemm(V, BLOCK, (int)tile.n, transposed(tile.v, padded(V)), scores, BLOCK, o_linear_, BLOCK,
         Into::add, Skip::depth_keys, &band);
  }

  const float g = p_.g(h), lambda = p_.lambda(h);
  if (p_.gate) {
    attend_softmax(tiles, p_.window, block, (int)p_.D(), V, p_.scale, scores, softmax_);
  }
  float factor[BLOCK];
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec d = lambda * load(den + c) + p_.eps;
    if (p_.gate) {
      const Vec top = load(softmax_.m + c);
      d += g * load(softmax_.sum + c);
      store(m + c, select(top == splat(-INFINITY), Vec{}, top));
    }
    if (!p_.normalize) d = splat(1.0f);
    store(den + c, d);
    store(factor + c, 1.0f / d);
  }
  for (int i = 0; i < V; i++) {
    for (int c = 0; c < BLOCK; c += LANES) {
      float* y = o_linear_ + i * BLOCK + c;
      Vec sum = lambda * load(y);
      if (p_.gate) sum += g * load(softmax_.o + i * BLOCK + c);
      store(y, sum * load(factor + c));
    }
  }
  return o_linear_;
}

void forward_worker(const Problem& p, const Sequence& s, int64_t state_head, Chunkwise& c,
                    int64_t past, const lol_tensor& o, float* m, float* den,
                    const FinalState* final) {
  const int64_t total = c.tiles.total(), T = o.shape[2];
  // Blocks fold further than the final state may hold when some of it must stay revocable: take the
  // copy on the way.
  const auto fold = [&](int64_t end) {
    if (final && end >= final->fold) {
      c.fold(final->fold);
      c.store_state(final->kv, final->ksum);
      final = nullptr;
    }
    c.fold(end);
  };
  for (int64_t first = past; first < total; first += BLOCK) {
    const int64_t n = at_most(BLOCK, total - first);
    fold(p.window.start(first));
    for (int64_t h = state_head * p.group(); h < (state_head + 1) * p.group(); h++) {
      Tokens from = tokens_of(p.q, s, h), to = tokens_of(o, s, h);
      from.past = to.past = past;
      float block_m[BLOCK], block_den[BLOCK];
      const Queries block = c.load_queries(h, first, n, from);
      const float* y = c.attend(block, h, block_m, block_den);
      to_rows(c.row_tile, y, to.width);
      store_rows(to, first, n, c.row_tile);
      const int64_t row0 = (s.batch * p.heads() + h) * T;
      for (int64_t i = 0; i < n; i++) {
        if (m) m[row0 + s.row(first + i)] = block_m[i];
        if (den) den[row0 + s.row(first + i)] = block_den[i];
      }
    }
  }
  if (final) fold(at_least(final->fold, c.folded()));
}

void clear_padding(const Batch& batch, const lol_tensor& o, float* m, float* den) {
  if (!batch.padded) return;
  const int64_t rows = o.shape[0] * o.shape[1] * o.shape[2];
  clear(o);
  if (m) fill(m, rows, 0.0f);
  if (den) fill(den, rows, 1.0f);
}

}  // namespace LOL_ISA
}  // namespace lol
