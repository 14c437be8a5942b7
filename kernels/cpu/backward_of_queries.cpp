// The pass forward in time.
#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

class QueryGradients {
 public:
  static int64_t floats(const Problem& p) {
    return Chunkwise::floats(p) + QueryBlock::floats(p) + rows_size(p.D()) + lanes_size(p.F()) +
           (MOST_TILES + 1) * BLOCK * BLOCK + MapBackward::scratch_size(p.D(), p.f()) + 64;
  }
  QueryGradients(const BackwardRun& run, Arena& arena)
      : run_(run),
        p_(run.p),
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
  }

  void run(StateSums before, StateSums after) {
    const int64_t h0 = run_.first_head();
    if (before.kv) c_.load_state(before.kv, before.ksum, folded_before(p_, run_.segment));
    for (int64_t first = run_.segment.begin; first < run_.segment.end; first += BLOCK) {
      c_.fold(p_.window.start(first));
      for (int64_t h = h0; h < h0 + p_.group(); h++) {
        block_.load(h, first);
        block_.prefetch(h, first + BLOCK);
        memset(dq_, 0, sizeof(float) * (size_t)rows_size(D_));
        RowSums sums = {};
        if (p_.gate) softmax_part(sums);
        feature_gradients();
        if (p_.normalize) correct_delta(sums);
        map_part();
        if (run_.wants_inputs()) store_rows(tokens_of(run_.b.dq, run_.s, h), first, block_.n, dq_);
      }
    }
    if (after.kv) c_.store_state(after.kv, after.ksum, {0, F_});
  }

 private:
  // Of each query's window: R = sum u dp, how many keys share the maximum score, and sum u.
  struct RowSums {
    float r[BLOCK], ties[BLOCK], u[BLOCK];
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
  void feature_gradients();
  void correct_delta(const RowSums& sums);
  void map_part();
  void value_products(const KeyTile& tile, const Band& band, float* dp) const;
  Operand by_query(const float* tile, int n, float* scratch) const;
  float* dp_at(int t) const { return dp_ + t * BLOCK * BLOCK; }

  const BackwardRun& run_;
  const Problem& p_;
  const Format format_;
  const int D_, V_, F_;
  Chunkwise c_;
  QueryBlock block_;
  float m_[BLOCK];
  float *dq_, *dphi_, *dp_;  // [BLOCK x padded(D)], [F x BLOCK], [MOST_TILES][BLOCK x BLOCK]
  float *by_query_, *scratch_;
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
        const Vec s = p_.scale * load(piece[t].weights + at);
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
    const Band& band = piece[t].softmax;
    float *u = piece[t].weights, *ds = dp_at(t);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec share = load(sums.r + c) / max(load(sums.ties + c), splat(1.0f));
      const Vec by_den = load(block_.by_den + c);
      for (int j = band.lo[c]; j < band.hi[c + LANES - 1]; j++) {
        const int at = j * BLOCK + c;
        const Vec weight = load(u + at);
        store(ds + at, p_.scale * (load(ds + at) - select(weight == splat(g), share, Vec{})));
        store(u + at, by_den * weight);
      }
    }
    gemm(format_, n, ldv, BLOCK, by_query(u, n, by_query_), block_.dy_rows, ldv,
         run_.dv_at(tile.start), ldv, Into::add, Skip::queries_of_m, &band);
    gemm(format_, n, ldd, BLOCK, by_query(ds, n, by_query_), block_.q_rows, ldd,
         run_.dk_at(tile.start), ldd, Into::add, Skip::queries_of_m, &band);
    if (format_ != Format::f32) pair_rows(ds, ds, n, BLOCK);
    gemm(format_, (int)block_.n, ldd, n, transposed(ds, BLOCK), tile.k_rows, ldd, dq_, ldd,
         Into::add, Skip::keys_of_m, &band);
  }
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
  if (!pieces.more()) {
    score_gradients(piece, count, g, sums);
    if (run_.wants_inputs()) apply_score_gradients(piece, count, g, sums);
  } else {
    while ((count = pieces.next(piece, c_.scores, D_))) raise_maximum(piece, count);
    pieces.restart();
    while ((count = pieces.next(piece, c_.scores, D_))) score_gradients(piece, count, g, sums);
    pieces.restart();
    while (run_.wants_inputs() && (count = pieces.next(piece, c_.scores, D_))) {
      RowSums seen = {};
      score_gradients(piece, count, g, seen);
      apply_score_gradients(piece, count, g, sums);
    }
  }
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
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec times = load(factor + c), less = load(shift + c);
      for (int i = 0; i < F_; i++) {
        float* d = dphi_ + i * BLOCK + c;
        store(d, times * load(d) - c_.state.ksum[i] * less);
      }
    }
  }
  const Starts starts(p_.window, block_.first, block_.n);
  const int64_t linear_end = p_.window.start(block_.first + block_.n - 1);
  for (int64_t start = c_.state.folded; start < linear_end; start += BLOCK) {
    KeyTile& tile = c_.tiles.at(start);
    const int n = (int)tile.n;
    const Band band = linear_band(starts, start, n);
    value_products(tile, band, dp_);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec times = load(factor + c), less = load(shift + c);
      clear_outside(dp_, band, c, n);
      for_band(band, c, [&](int j, auto keep) {
        float* d = dp_ + j * BLOCK + c;
        store(d, keep(times * load(d) - less));
      });
    }
    if (format_ != Format::f32) pair_rows(dp_, dp_, n, BLOCK);
    gemm(format_, F_, BLOCK, n, c_.tiles.phi_by_keys(tile), dp_, BLOCK, dphi_, BLOCK, Into::add,
         Skip::keys_of_n, &band);
  }
}

// With L = dphi_q . phi_q, R + L is delta times eps' share of den if delta is exact; but y has been
// rounded, and the difference is what delta is off by. Where much of a gradient cancels, that
// shows: in the gate's, a multiple of R summed over all queries, where R has the window's share of
// it; and in dphi_q where features have much in common, by the keys in the state. In fp32 it is
// noise.
void QueryGradients::correct_delta(const RowSums& sums) {
  const float g = p_.g(block_.h), lambda = p_.lambda(block_.h);
  const bool in_features = p_.q.dtype != LOL_F32 && !c_.state.empty;
  Vec of_gate = {};
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec l = {};
    for (int i = 0; i < F_; i++)
      l += load(block_.phi + i * BLOCK + c) * load(dphi_ + i * BLOCK + c);
    const Vec r = load(sums.r + c), inverse = 1.0f / load(block_.den + c);
    const Vec off = r + l - p_.eps * load(block_.by_den + c) * load(block_.delta + c);
    of_gate += r - load(sums.u + c) * inverse * off;
    for (int i = 0; in_features && i < F_; i++) {
      float* d = dphi_ + i * BLOCK + c;
      store(d, load(d) - c_.state.ksum[i] * (lambda * inverse * off));
    }
  }
  if (!p_.gate) return;
  run_.partials.gate(run_.slot, block_.h) +=
      horizontal_sum(of_gate) * (p_.affine ? 1.0f : 1.0f - g);
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
