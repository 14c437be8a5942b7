// The pass forward in time.
#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

class QueryGradients {
 public:
  static int64_t floats(const Problem& p) {
    return Chunkwise::floats(p) + QueryBlock::floats(p) + rows_size(p.D()) + lanes_size(p.F()) +
           (MOST_TILES + 1) * BLOCK * BLOCK + MapBackward::scratch_size(p.D(), p.f()) +
           padded(p.D()) + 64;
  }
  QueryGradients(const BackwardRun& run, Arena& arena)
      : run_(run),
        p_(run.p),
        pace_(p_.pace()),
        format_(run.p.format),
        D_((int)run.p.D()),
        V_((int)run.p.V()),
        F_((int)run.p.F()),
        c_(p_, run.state_head, run.s.tokens, run.keys(), run.values(), arena, Along::values),
        block_(run, run.new_delta, arena) {
    dq_ = arena.take(rows_size(D_));
    dphi_ = arena.take(lanes_size(F_));
    dp_ = arena.take(MOST_TILES * BLOCK * BLOCK);
    by_query_ = arena.take(BLOCK * BLOCK);
    scratch_ = arena.take(MapBackward::scratch_size(D_, p_.f()));
    less_mean_ = arena.take(padded(D_));
  }

  void run(StateSums before, StateSums after) {
    const int64_t h0 = run_.first_head();
    if (before.kv) c_.load_state(before.kv, before.ksum, folded_before(p_, run_.segment));
    int64_t cleared = 0;
    for (int64_t first = run_.segment.begin; first < run_.segment.end; first += BLOCK) {
      c_.fold(p_.window.start(first));
      if (run_.wants_inputs()) {
        // A tile's rows that no query sees yet take zeros, a block ahead at most.
        const int64_t end = at_most(run_.row(first) + 2 * BLOCK, run_.rows);
        run_.clear_rows(cleared, end);
        cleared = end;
      }
      for (int64_t h = h0; h < h0 + p_.group(); h++) {
        block_.load(h, first);
        block_.prefetch(h, first + BLOCK);
        memset(dq_, 0, sizeof(float) * (size_t)rows_size(D_));
        RowSums sums = {};
        feature_gradients();
        if (p_.gate) {
          softmax_part(sums);
        } else if (p_.normalize) {
          correct_delta(sums);
        }
        if (run_.b.corrects_delta()) {
          take_from_features(sums.excess);
          block_.store_delta();
        }
        map_part();
        if (run_.wants_inputs()) store_rows(tokens_of(run_.b.dq, run_.s, h), first, block_.n, dq_);
      }
    }
    if (after.kv) c_.store_state(after.kv, after.ksum, {0, F_});
  }

 private:
  // Of each query's window: R = sum u dp, how many keys share the maximum score, and sum u; and
  // what each u dp, computed before delta was corrected, has too much, divided by u.
  struct RowSums {
    float r[BLOCK], ties[BLOCK], u[BLOCK], excess[BLOCK];
  };

  void softmax_part(RowSums& sums);
  void raise_maximum(const WeightTile* piece, int count);
  void score_gradients(WeightTile* piece, int count, float g, RowSums& sums) {
    if (format_ == Format::f32) {
      score_gradients<Format::f32>(piece, count, g, sums);
    } else {
      score_gradients<Format::bf16_pairs>(piece, count, g, sums);
    }
  }
  template <Format format>
  void score_gradients(WeightTile* piece, int count, float g, RowSums& sums);
  void apply_score_gradients(WeightTile* piece, int count, float g, const RowSums& sums);
  void correct_dq();
  void feature_gradients();
  template <class Weigh>
  void add_linear_keys(Weigh weigh);
  void correct_delta(RowSums& sums);
  void take_from_features(const float* excess);
  void map_part();
  void value_products(const KeyTile& tile, const Band& band, float* dp) const;
  Operand by_query(const float* tile, int n, float* scratch) const;
  float* dp_at(int t) const { return dp_ + t * BLOCK * BLOCK; }

  const BackwardRun& run_;
  const Problem& p_;
  const Pace pace_;
  const Format format_;
  const int D_, V_, F_;
  Chunkwise c_;
  QueryBlock block_;
  float m_[BLOCK];
  float *dq_, *dphi_, *dp_;  // [BLOCK x padded(D)], [F x BLOCK], [MOST_TILES][BLOCK x BLOCK]
  float *by_query_, *scratch_;
  // By pairs: what the rounded ds of each query add up to, and minus a mean of keys [padded(D)].
  float sum_of_ds_[BLOCK], *less_mean_;
};

// dy . v of a tile, within the band.
void QueryGradients::value_products(const KeyTile& tile, const Band& band, float* dp) const {
  gemm(format_, (int)tile.n, BLOCK, V_, c_.tiles.values(tile), block_.dy, BLOCK, dp, BLOCK,
       Into::set, Skip::outputs, &band);
}

// A key x query tile as the left side of a sum over queries.
Operand QueryGradients::by_query(const float* tile, int n, float* scratch) const {
  if (format_ == Format::f32) return rows(tile, BLOCK);
  pair_columns(scratch, tile, n);
  return rows(scratch, BLOCK / 2);
}

// The maximum of each query's scores, up to these tiles. It is taken anew: the forward pass may
// have run on another instruction set and rounded differently, and ties are told by equality.
void QueryGradients::raise_maximum(const WeightTile* piece, int count) {
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec m = load(m_ + c);
    for (int t = 0; t < count; t++) {
      for_band(piece[t].softmax, c, [&](int j, auto keep) {
        m = max(m, keep(p_.scale * load(piece[t].weights + j * BLOCK + c), splat(-INFINITY)));
      });
    }
    store(m_ + c, m);
  }
}

// u into each tile's weights and u dp into its dp, and their sums; at the maximum, and nowhere
// else, u is exactly g.
template <Format format>
void QueryGradients::score_gradients(WeightTile* piece, int count, float g, RowSums& sums) {
  const Vec most = splat(g), less = splat(BELOW_ONE * g);
  for (int t = 0; t < count; t++) {
    const int64_t n = piece[t].tile->n;
    const Band& band = piece[t].softmax;
    value_products(*piece[t].tile, band, dp_at(t));
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec m = load(m_ + c), by_den = load(block_.by_den + c);
      const Vec shift = by_den * load(block_.delta + c);
      Vec r = load(sums.r + c), ties = load(sums.ties + c), total = load(sums.u + c);
      clear_outside(piece[t].weights, band, c, n);
      clear_outside(dp_at(t), band, c, n);
      for_band(band, c, [&](int j, auto keep) {
        const int at = j * BLOCK + c;
        const Vec s = rounded(p_.scale * load(piece[t].weights + at));
        const Vec u = keep(select(s == m, most, min(g * exp_below_one_for<format>(s - m), less)));
        const Vec du = keep(u * (by_den * load(dp_at(t) + at) - shift));
        r += du;
        total += u;
        ties += select(u == most, splat(1.0f), Vec{});
        store(piece[t].weights + at, u);
        store(dp_at(t) + at, du);
      });
      store(sums.r + c, r);
      store(sums.ties + c, ties);
      store(sums.u + c, total);
    }
  }
}

// ds = scale (u dp - R at the maximum), then dq, dk and dv.
void QueryGradients::apply_score_gradients(WeightTile* piece, int count, float g,
                                           const RowSums& sums) {
  const int ldd = padded(D_), ldv = padded(V_);
  for (int t = 0; t < count; t++) {
    const KeyTile& tile = *piece[t].tile;
    const int n = (int)tile.n;
    const Band &band = piece[t].softmax, queries = of_rows(band);
    float *u = piece[t].weights, *ds = dp_at(t);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec share = load(sums.r + c) / max(load(sums.ties + c), splat(1.0f));
      const Vec by_den = load(block_.by_den + c), excess = load(sums.excess + c);
      for (int j = band.lo[c]; j < band.hi[c + LANES - 1]; j++) {
        const int at = j * BLOCK + c;
        const Vec weight = load(u + at), of_maximum = select(weight == splat(g), share, Vec{});
        store(ds + at, p_.scale * (load(ds + at) - weight * excess - of_maximum));
        store(u + at, by_den * weight);
      }
    }
    gemm(format_, n, ldv, BLOCK, by_query(u, n, by_query_), block_.dy_rows, ldv,
         run_.dv_at(tile.start), ldv, Into::add, Skip::depth_of_row, &queries);
    gemm(format_, n, ldd, BLOCK, by_query(ds, n, by_query_), block_.q_rows, ldd,
         run_.dk_at(tile.start), ldd, Into::add, Skip::depth_of_row, &queries);
    if (format_ != Format::f32) round_rows(ds, n, sum_of_ds_);
    gemm(format_, (int)block_.n, ldd, n, transposed(ds, BLOCK), tile.k_rows, ldd, dq_, ldd,
         Into::add, Skip::depth_of_row, &band);
  }
}

// The ds of a query add up to 0 before they are rounded, so that dq = sum ds k is the same with any
// vector taken from all keys. Rounded they do not: dq is off by their sum times what the keys have
// in common.
void QueryGradients::correct_dq() {
  const int ldd = padded(D_);
  gemm((int)block_.n, ldd, 1, transposed(sum_of_ds_, BLOCK), less_mean_, ldd, dq_, ldd, Into::add);
}

// The maximum of the whole window comes before R, and R before any ds: a window of several pieces
// is walked three times.
void QueryGradients::softmax_part(RowSums& sums) {
  const float g = p_.g(block_.h);
  WeightTile piece[MOST_TILES];
  fill(m_, BLOCK, -INFINITY);
  const Queries queries = {block_.first, block_.n, block_.q, block_.phi};
  Pieces pieces(c_.tiles, p_.window, queries, p_.window.start(block_.first));
  int count = pieces.next(piece, c_.scores, D_);
  raise_maximum(piece, count);
  const bool corrects_dq = format_ != Format::f32 && count > 0 && run_.wants_inputs();
  if (corrects_dq) {
    const KeyTile& oldest = *piece[count - 1].tile;
    sum_of_rows(less_mean_, -1.0f / (float)oldest.n, oldest.k_rows, (int)oldest.n, padded(D_));
    fill(sum_of_ds_, BLOCK, 0.0f);
  }
  if (!pieces.more()) {
    score_gradients(piece, count, g, sums);
    correct_delta(sums);
    if (run_.wants_inputs()) apply_score_gradients(piece, count, g, sums);
  } else {
    while ((count = pieces.next(piece, c_.scores, D_))) raise_maximum(piece, count);
    pieces.restart();
    while ((count = pieces.next(piece, c_.scores, D_))) score_gradients(piece, count, g, sums);
    correct_delta(sums);
    RowSums again = sums;  // of dp that are computed again, with the new delta
    memset(again.excess, 0, sizeof(again.excess));
    pieces.restart();
    while (run_.wants_inputs() && (count = pieces.next(piece, c_.scores, D_))) {
      RowSums seen = {};
      score_gradients(piece, count, g, seen);
      apply_score_gradients(piece, count, g, again);
    }
  }
  if (corrects_dq) correct_dq();
}

// dphi_q = lambda sum_N dp phi_k: from the state, and from the linear keys that are not in it.
void QueryGradients::feature_gradients() {
  const float lambda = p_.lambda(block_.h);
  float factor[BLOCK], shift[BLOCK];
  for (int c = 0; c < BLOCK; c++) {
    factor[c] = lambda * block_.by_den[c];
    shift[c] = factor[c] * block_.delta[c];
  }
  if (c_.state.empty) {
    memset(dphi_, 0, sizeof(float) * F_ * BLOCK);
  } else {
    const int ldv = format_ == Format::f32 ? padded(V_) : padded(V_) / 2;
    gemm(format_, F_, BLOCK, V_, rows(c_.state.readable, ldv), block_.dy, BLOCK, dphi_, BLOCK,
         Into::set);
    float of_center[BLOCK] = {};
    if (c_.center()) add_products(format_, of_center, c_.center(), block_.dy, V_);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec times = load(factor + c), less = load(shift + c) - times * load(of_center + c);
      for (int i = 0; i < F_; i++) {
        float* d = dphi_ + i * BLOCK + c;
        store(d, times * load(d) - c_.state.ksum[i] * less);
      }
    }
  }
  add_linear_keys([&](const KeyTile& tile, const Band& band, int n, float* dp) {
    value_products(tile, band, dp);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec times = load(factor + c), less = load(shift + c);
      clear_outside(dp, band, c, n);
      for_band(band, c, [&](int j, auto keep) {
        float* d = dp + j * BLOCK + c;
        store(d, keep(times * load(d) - less));
      });
    }
  });
}

// dphi_q with sum_N w phi_k over the linear keys that are not in the state; `weigh` writes w of a
// tile [n x BLOCK] within its band.
template <class Weigh>
void QueryGradients::add_linear_keys(Weigh weigh) {
  const Starts starts(p_.window, block_.first, block_.n);
  const int64_t linear_end = p_.window.start(block_.first + block_.n - 1);
  for (int64_t start = c_.state.folded; start < linear_end; start += BLOCK) {
    KeyTile& tile = c_.tiles.at(start);
    const int n = (int)tile.n;
    const Band band = linear_band(starts, start, n);
    weigh(tile, band, n, dp_);
    if (format_ != Format::f32) pair_rows(dp_, dp_, n, BLOCK);
    gemm(format_, F_, BLOCK, n, c_.tiles.phi_by_keys(tile), dp_, BLOCK, dphi_, BLOCK, Into::add,
         Skip::depth_of_column, &band);
  }
}

// With L = dphi_q . phi_q, R + L is delta times eps' share of den if delta is exact; but y has been
// rounded, and the difference is what delta is off by, times den. Where v has much in common, or
// features have, gradients are small differences beside it. From here on delta and R are without
// it, and dp is when `excess` has been taken from it.
void QueryGradients::correct_delta(RowSums& sums) {
  const float g = p_.g(block_.h);
  Vec of_gate = {};
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec l = {};
    for (int i = 0; i < F_; i++)
      l += load(block_.phi + i * BLOCK + c) * load(dphi_ + i * BLOCK + c);
    const Vec by_den = load(block_.by_den + c), delta = load(block_.delta + c);
    const Vec off = load(sums.r + c) + l - p_.eps * by_den * delta;
    const Vec excess = off / load(block_.den + c);
    const Vec r = load(sums.r + c) - load(sums.u + c) * excess;
    of_gate += r;
    store(sums.r + c, r);
    store(sums.excess + c, excess);
    store(block_.delta + c, delta + select(by_den == Vec{}, Vec{}, excess / by_den));
  }
  if (!p_.gate) return;
  run_.partials.gate(run_.slot, block_.h) +=
      horizontal_sum(of_gate) * (p_.affine ? 1.0f : 1.0f - g);
}

// What every linear key has contributed to dphi_q too much.
void QueryGradients::take_from_features(const float* excess) {
  const float lambda = p_.lambda(block_.h);
  for (int c = 0; !c_.state.empty && c < BLOCK; c += LANES) {
    const Vec less = lambda * load(excess + c);
    for (int i = 0; i < F_; i++) {
      float* d = dphi_ + i * BLOCK + c;
      store(d, load(d) - c_.state.ksum[i] * less);
    }
  }
  add_linear_keys([&](const KeyTile&, const Band& band, int n, float* dp) {
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec less = lambda * load(excess + c);
      clear_outside(dp, band, c, n);
      for_band(band, c, [&](int j, auto keep) { store(dp + j * BLOCK + c, keep(-less)); });
    }
  });
}

void QueryGradients::map_part() {
  const BackwardMap& own = block_.map();
  features_backward(
      own.map,
      {block_.q_rows, block_.q, block_.phi, own.weight_t, run_.partials.q(run_.slot, block_.h),
       run_.wants_inputs() ? dq_ : nullptr, block_.n, scratch_},
      dphi_);
}

}  // namespace

int64_t backward_of_queries_floats(const Problem& p) { return QueryGradients::floats(p); }
void backward_of_queries(const BackwardRun& run, StateSums before, StateSums after, Arena arena) {
  QueryGradients(run, arena).run(before, after);
}

}  // namespace LOL_ISA
}  // namespace lol
