#include "gather.h"

namespace lol {
namespace LOL_ISA {

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
    if (w.softmax.empty()) {
      w.softmax = Band{};
      continue;
    }
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
        const Vec e = keep(g * exp_below_one_for<format>(rounded(scale * load(w)) - shift));
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
      // den takes weights as the values are weighed.
      if (format != Format::f32) round_rows(piece[t].weights, n, out.den);
      bands[t] = seen(piece[t]);
      const Operand a = transposed(piece[t].weights, BLOCK);
      terms[t] = {n, a, piece[t].tile->v, ld, Skip::depth_of_row, &bands[t]};
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

void normalize(Sums& sums, int64_t n, int V, float factor) {
  const int ld = padded(V);
  float *y = sums.y, factors[BLOCK];
  for (int c = 0; c < BLOCK; c += LANES) store(factors + c, factor / load(sums.den + c));
  for (int64_t i = 0; i < n; i++, y += ld) {
    for (int j = 0; j < ld; j += LANES) store(y + j, factors[i] * load(y + j));
  }
}

}  // namespace LOL_ISA
}  // namespace lol
