#include "backward.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Gradients of one sequence's keys and values as its workers sum them, [batch x state heads x T x
// padded(D | V)].
struct KeyGradients {
  float *dk = nullptr, *dv = nullptr;
  int64_t T = 0;
  static int64_t row(const Sequence& s, int64_t position) {
    return (s.index ? 0 : s.first) + position;
  }
};

class BackwardWorker {
 public:
  static int64_t floats(const Problem& p);
  BackwardWorker(const BackwardProblem& b, const Sequence& s, int64_t state_head,
                 const KeyGradients& keys, const ParameterPartials& partials, int64_t worker,
                 Arena& arena);
  void run();

 private:
  struct SoftmaxGradient {
    float r[BLOCK], ties[BLOCK];
  };

  void load_block(int64_t h, int64_t first);
  void forward_in_time(int64_t h, int64_t first);
  void softmax_part(int64_t h);
  void raise_maximum(const WeightTile* piece, int count);
  void score_gradients(WeightTile* piece, int count, float g, SoftmaxGradient& sum);
  void apply_score_gradients(WeightTile* piece, int count, float g, const SoftmaxGradient& sum);
  void backward_in_time(int64_t first, int64_t begin, int64_t end);
  void linear_score_gradients(KeyTile& tile, const Band& band);
  void mixed_part(KeyTile& tile, const Band& band);
  void add_rows(float* to, int64_t ld, const float* from, int64_t n) const;
  bool wants_inputs() const { return b_.dq.data != nullptr; }
  float* dk_at(int64_t position) const {
    return dk_ + KeyGradients::row(s_, position) * padded(p_.D());
  }
  float* dv_at(int64_t position) const {
    return dv_ + KeyGradients::row(s_, position) * padded(p_.V());
  }
  float* dp_at(int t) const { return dp_ + t * BLOCK * BLOCK; }

  const BackwardProblem& b_;
  const Problem& p_;
  const Sequence& s_;
  const ParameterPartials& partials_;
  const int64_t state_head_, worker_;
  const int D_, V_, F_;
  Chunkwise c_;
  float *dk_, *dv_;  // this state head's rows
  bool has_dstate_ = false;
  float *dkv_, *dksum_;  // [F x padded(V)], [F]

  // The block of queries at hand, with lambda phi_q in the pass backward in time.
  Queries block_;
  float *q_rows_, *g_rows_, *g_;  // [BLOCK x padded(D)], G as [BLOCK x padded(V)] and [V x BLOCK]
  float m_[BLOCK], delta_[BLOCK];
  float *dq_, *dphi_, *dp_, *scratch_, *value_lanes_;
};

int64_t BackwardWorker::floats(const Problem& p) {
  const int64_t f_rows = has_map(p.feature_k) ? rows_size(p.feature_k.weight.shape[2]) : 0;
  return Chunkwise::floats(p) + p.F() * padded(p.V()) + p.F() + rows_size(p.D()) +
         rows_size(p.V()) + 2 * lanes_size(p.V()) + lanes_size(p.D()) + lanes_size(p.F()) +
         MOST_TILES * BLOCK * BLOCK + at_least(f_rows, BLOCK * BLOCK);
}

BackwardWorker::BackwardWorker(const BackwardProblem& b, const Sequence& s, int64_t state_head,
                               const KeyGradients& keys, const ParameterPartials& partials,
                               int64_t worker, Arena& arena)
    : b_(b),
      p_(b.p),
      s_(s),
      partials_(partials),
      state_head_(state_head),
      worker_(worker),
      D_((int)p_.D()),
      V_((int)p_.V()),
      F_((int)p_.F()),
      c_(p_, state_head, s.tokens, tokens_of(p_.k, s, p_.kv_head_of(state_head)),
         tokens_of(p_.v, s, p_.kv_head_of(state_head)), arena) {
  const int64_t head = s.batch * p_.state_heads() + state_head;
  dk_ = keys.dk + head * keys.T * padded(D_);
  dv_ = keys.dv + head * keys.T * padded(V_);
  dkv_ = arena.take(F_ * padded(V_));
  dksum_ = arena.take(F_);
  q_rows_ = arena.take(rows_size(D_));
  g_rows_ = arena.take(rows_size(V_));
  g_ = arena.take(lanes_size(V_));
  value_lanes_ = arena.take(lanes_size(V_));
  dq_ = arena.take(lanes_size(D_));
  dphi_ = arena.take(lanes_size(F_));
  dp_ = arena.take(MOST_TILES * BLOCK * BLOCK);
  const int64_t f_rows = has_map(p_.feature_k) ? rows_size(p_.feature_k.weight.shape[2]) : 0;
  scratch_ = arena.take(at_least(f_rows, BLOCK * BLOCK));
}

// q, phi_q, G and delta / den of the block at `first`.
void BackwardWorker::load_block(int64_t h, int64_t first) {
  const int64_t n = at_most(BLOCK, s_.tokens - first);
  block_ = c_.load_queries(h, first, n, tokens_of(p_.q, s_, h));
  if (wants_inputs()) load_rows(q_rows_, tokens_of(p_.q, s_, h), first, n);
  load_rows(g_rows_, tokens_of(b_.dy, s_, h), first, n);
  memset(delta_, 0, sizeof(delta_));
  const int ld = padded(V_);
  const int64_t row0 = (s_.batch * p_.heads() + h) * p_.q.shape[2];
  const Tokens y = b_.y.data ? tokens_of(b_.y, s_, h) : Tokens{};
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = row0 + s_.row(first + i);
    float* g = g_rows_ + i * ld;
    const float factor = b_.dy_factor / b_.den[row];
    if (b_.delta) {
      delta_[i] = factor * b_.delta[row];
    } else if (p_.normalize) {
      load_row(c_.row_tile, y.row(first + i), V_, y.dtype);
      Vec dot = {};
      for (int j = 0; j < ld; j += LANES) dot += load(g + j) * load(c_.row_tile + j);
      for (int lane = 0; lane < LANES; lane++) delta_[i] += factor * dot[lane];
    }
    for (int j = 0; j < ld; j += LANES) store(g + j, factor * load(g + j));
  }
  to_lanes(g_, g_rows_, V_);
}

void BackwardWorker::add_rows(float* to, int64_t ld, const float* from, int64_t n) const {
  for (int64_t i = 0; i < n * ld; i += LANES) store(to + i, load(to + i) + load(from + i));
}

// The maximum of each query's scores, up to these tiles. It is taken anew: products by pairs may
// have rounded differently in the forward pass, and ties are told by equality.
void BackwardWorker::raise_maximum(const WeightTile* piece, int count) {
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

// u into each tile's weights and u dp into its dp; sums R and counts the keys at the maximum, where
// u is exactly g.
void BackwardWorker::score_gradients(WeightTile* piece, int count, float g, SoftmaxGradient& sum) {
  for (int t = 0; t < count; t++) {
    const int n = (int)piece[t].tile->n;
    const Band& band = piece[t].softmax;
    gemm(n, BLOCK, V_, rows(piece[t].tile->v, padded(V_)), g_, BLOCK, dp_at(t), BLOCK, Into::set,
         Skip::outputs, &band);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec m = load(m_ + c), delta = load(delta_ + c);
      Vec r = load(sum.r + c), ties = load(sum.ties + c);
      clear_outside(piece[t].weights, band, c, n);
      clear_outside(dp_at(t), band, c, n);
      for_band(band, c, [&](int j, auto keep) {
        const int at = j * BLOCK + c;
        const Vec s = p_.scale * load(piece[t].weights + at);
        const Vec u = keep(select(s == m, splat(g), g * exp(s - m)));
        const Vec du = keep(u * (load(dp_at(t) + at) - delta));
        r += du;
        ties += select(u == splat(g), splat(1.0f), Vec{});
        store(piece[t].weights + at, u);
        store(dp_at(t) + at, du);
      });
      store(sum.r + c, r);
      store(sum.ties + c, ties);
    }
  }
}

// ds = scale (u dp - R at the maximum), then dq, dk and dv.
void BackwardWorker::apply_score_gradients(WeightTile* piece, int count, float g,
                                           const SoftmaxGradient& sum) {
  for (int t = 0; t < count; t++) {
    const int n = (int)piece[t].tile->n, ldd = padded(D_), ldv = padded(V_);
    const Band& band = piece[t].softmax;
    float *u = piece[t].weights, *ds = dp_at(t);
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec share = load(sum.r + c) / max(load(sum.ties + c), splat(1.0f));
      for (int j = band.lo[c]; j < band.hi[c + LANES - 1]; j++) {
        const int at = j * BLOCK + c;
        store(ds + at, p_.scale * (load(ds + at) - select(load(u + at) == splat(g), share, Vec{})));
      }
    }
    gemm(D_, BLOCK, n, rows(piece[t].tile->keys, BLOCK), ds, BLOCK, dq_, BLOCK, Into::add,
         Skip::keys_of_n, &band);
    gemm(n, ldd, BLOCK, rows(ds, BLOCK), q_rows_, ldd, dk_at(piece[t].tile->start), ldd, Into::add,
         Skip::queries_of_m, &band);
    gemm(n, ldv, BLOCK, rows(u, BLOCK), g_rows_, ldv, dv_at(piece[t].tile->start), ldv, Into::add,
         Skip::queries_of_m, &band);
  }
}

// The maximum of the whole window comes before R, and R before any ds: a window of several pieces
// is walked three times.
void BackwardWorker::softmax_part(int64_t h) {
  const float g = p_.g(h);
  SoftmaxGradient sum = {};
  WeightTile piece[MOST_TILES];
  fill(m_, BLOCK, -INFINITY);
  Pieces pieces(c_.tiles, p_.window, block_, p_.window.start(block_.first));
  int count = pieces.next(piece, c_.scores, D_);
  raise_maximum(piece, count);
  if (!pieces.more()) {
    score_gradients(piece, count, g, sum);
    if (wants_inputs()) apply_score_gradients(piece, count, g, sum);
  } else {
    while ((count = pieces.next(piece, c_.scores, D_))) raise_maximum(piece, count);
    pieces.restart();
    while ((count = pieces.next(piece, c_.scores, D_))) score_gradients(piece, count, g, sum);
    pieces.restart();
    while (wants_inputs() && (count = pieces.next(piece, c_.scores, D_))) {
      SoftmaxGradient seen = {};
      score_gradients(piece, count, g, seen);
      apply_score_gradients(piece, count, g, sum);
    }
  }
  float total = 0.0f;
  for (int c = 0; c < BLOCK; c++) total += sum.r[c];
  partials_.gate(worker_, h) += total * (p_.affine ? 1.0f : 1.0f - g);
}

void BackwardWorker::forward_in_time(int64_t h, int64_t first) {
  load_block(h, first);
  memset(dq_, 0, sizeof(float) * D_ * BLOCK);
  if (p_.gate) softmax_part(h);

  if (!c_.state.empty) {
    gemm(F_, BLOCK, V_, rows(c_.state.kv, padded(V_)), g_, BLOCK, dphi_, BLOCK, Into::set);
    for (int i = 0; i < F_; i++) {
      for (int c = 0; c < BLOCK; c += LANES) {
        float* d = dphi_ + i * BLOCK + c;
        store(d, load(d) - c_.state.ksum[i] * load(delta_ + c));
      }
    }
  } else {
    memset(dphi_, 0, sizeof(float) * F_ * BLOCK);
  }
  const int64_t linear_end = p_.window.start(first + block_.n - 1);
  for (int64_t start = c_.state.folded; start < linear_end; start += BLOCK) {
    KeyTile& tile = c_.tiles.at(start);
    const Band band = linear_band(p_.window, start, tile.n, first, block_.n);
    linear_score_gradients(tile, band);
    gemm(F_, BLOCK, (int)tile.n, rows(c_.tiles.phi(tile), BLOCK), dp_, BLOCK, dphi_, BLOCK,
         Into::add, Skip::keys_of_n, &band);
  }
  const float lambda = p_.lambda(h);
  for (int i = 0; lambda != 1.0f && i < F_ * BLOCK; i += LANES)
    store(dphi_ + i, lambda * load(dphi_ + i));

  const FeatureMap map = p_.map_q(h);
  features_backward(map, block_.q, block_.phi, dphi_, wants_inputs() ? dq_ : nullptr, Into::add);
  features_backward_weight(map, block_.q, dphi_, partials_.q(worker_, h), scratch_);
  if (wants_inputs()) {
    to_rows(c_.row_tile, dq_, D_);
    store_rows(tokens_of(b_.dq, s_, h), first, block_.n, c_.row_tile);
  }
}

// dp of a tile's linear keys, zero outside the band.
void BackwardWorker::linear_score_gradients(KeyTile& tile, const Band& band) {
  gemm((int)tile.n, BLOCK, V_, rows(tile.v, padded(V_)), g_, BLOCK, dp_, BLOCK, Into::set,
       Skip::outputs, &band);
  for (int j = 0; j < tile.n; j++) {
    for (int c = 0; c < BLOCK; c += LANES) {
      float* d = dp_ + j * BLOCK + c;
      store(d, load(d) - load(delta_ + c));
    }
  }
  keep_band(dp_, band, tile.n);
}

// The queries at hand, with lambda phi_q, against a tile of keys that some of them see as linear:
// dphi_k and dv.
void BackwardWorker::mixed_part(KeyTile& tile, const Band& band) {
  if (wants_inputs()) {
    const int ldv = padded(V_);
    linear_scores(c_.tiles, tile, block_, F_, band, c_.scores);
    gemm((int)tile.n, ldv, BLOCK, rows(c_.scores, BLOCK), g_rows_, ldv, dv_at(tile.start), ldv,
         Into::add, Skip::queries_of_m, &band);
  }
  linear_score_gradients(tile, band);
  memset(dp_ + tile.n * BLOCK, 0, sizeof(float) * (BLOCK - tile.n) * BLOCK);
  transpose(scratch_, BLOCK, dp_, BLOCK, BLOCK, BLOCK);
  gemm(F_, BLOCK, BLOCK, rows(block_.phi, BLOCK), scratch_, BLOCK, dphi_, BLOCK, Into::add,
       Skip::queries_of_n, &band);
}

// The keys [begin, end), which the block at `first` and earlier ones see in full by softmax at
// most, later ones as linear; then the block's own contribution to dkv and dksum. first < 0: keys
// that every query sees as linear.
void BackwardWorker::backward_in_time(int64_t first, int64_t begin, int64_t end) {
  const int64_t h0 = state_head_ * p_.group(), h1 = h0 + p_.group();
  const int ldd = padded(D_), ldv = padded(V_);
  const auto load_scaled = [&](int64_t h) {
    load_block(h, first);
    const float lambda = p_.lambda(h);
    float* phi = const_cast<float*>(block_.phi);
    for (int i = 0; lambda != 1.0f && i < F_ * BLOCK; i += LANES)
      store(phi + i, lambda * load(phi + i));
  };
  for (int64_t start = begin; start < end; start += BLOCK) {
    KeyTile& tile = c_.tiles.at(start);
    const int n = (int)at_most(tile.n, end - start);
    const float* phi = c_.tiles.phi(tile);
    if (has_dstate_) {
      to_lanes(value_lanes_, tile.v, V_);
      gemm(F_, BLOCK, V_, rows(dkv_, ldv), value_lanes_, BLOCK, dphi_, BLOCK, Into::set);
      for (int i = 0; i < F_; i++) {
        for (int c = 0; c < BLOCK; c += LANES)
          store(dphi_ + i * BLOCK + c, load(dphi_ + i * BLOCK + c) + dksum_[i]);
      }
      if (wants_inputs())
        gemm(n, ldv, F_, transposed(phi, BLOCK), dkv_, ldv, dv_at(start), ldv, Into::add);
    } else {
      memset(dphi_, 0, sizeof(float) * F_ * BLOCK);
    }
    const int64_t last = at_most(first + BLOCK, s_.tokens) - 1;
    if (first >= 0 && start < p_.window.start(last)) {
      const Band band = linear_band(p_.window, start, tile.n, first, last - first + 1);
      for (int64_t h = h0; h < h1; h++) {
        load_scaled(h);
        mixed_part(tile, band);
      }
    }
    for (int i = 0; i < F_; i++) {
      for (int j = n; j < BLOCK; j++) dphi_[i * BLOCK + j] = 0.0f;
    }
    const FeatureMap map = p_.map_k(state_head_);
    features_backward(map, tile.keys, phi, dphi_, wants_inputs() ? dq_ : nullptr, Into::set);
    features_backward_weight(map, tile.keys, dphi_, partials_.k(worker_), scratch_);
    if (wants_inputs()) {
      to_rows(c_.row_tile, dq_, D_);
      add_rows(dk_at(start), ldd, c_.row_tile, n);
    }
  }
  if (first < 0) return;
  for (int64_t h = h0; h < h1; h++) {
    load_scaled(h);
    gemm(F_, ldv, BLOCK, rows(block_.phi, BLOCK), g_rows_, ldv, dkv_, ldv, Into::add);
    for (int i = 0; i < F_; i++) {
      Vec sum = {};
      for (int c = 0; c < BLOCK; c += LANES)
        sum += load(block_.phi + i * BLOCK + c) * load(delta_ + c);
      float total = 0.0f;
      for (int lane = 0; lane < LANES; lane++) total += sum[lane];
      dksum_[i] -= total;
    }
    has_dstate_ = true;
  }
}

void BackwardWorker::run() {
  const int64_t at = s_.slot * p_.state_heads() + state_head_, h0 = state_head_ * p_.group();
  if (wants_inputs()) {
    memset(dk_at(0), 0, sizeof(float) * s_.tokens * padded(D_));
    memset(dv_at(0), 0, sizeof(float) * s_.tokens * padded(V_));
  }
  if (b_.kv0) c_.load_state(b_.kv0 + at * F_ * V_, b_.ksum0 + at * F_, 0);
  for (int64_t first = 0; first < s_.tokens; first += BLOCK) {
    c_.fold(p_.window.start(first));
    for (int64_t h = h0; h < h0 + p_.group(); h++) forward_in_time(h, first);
  }

  memset(dkv_, 0, sizeof(float) * F_ * padded(V_));
  memset(dksum_, 0, sizeof(float) * F_);
  for (int i = 0; b_.dkv && i < F_; i++) {
    memcpy(dkv_ + i * padded(V_), b_.dkv + (at * F_ + i) * V_, sizeof(float) * V_);
  }
  if (b_.dksum) memcpy(dksum_, b_.dksum + at * F_, sizeof(float) * F_);
  has_dstate_ = b_.dkv || b_.dksum;
  // Keys that no later block takes as linear matter to the last block alone, unless the final state
  // has a gradient.
  const int64_t blocks = (s_.tokens + BLOCK - 1) / BLOCK;
  int64_t end = has_dstate_ ? s_.tokens : p_.window.start(s_.tokens - 1);
  end = at_most(end, s_.tokens);
  for (int64_t b = blocks - 1; b >= 0; b--) {
    const int64_t begin = at_most(p_.window.start(b * BLOCK), end);
    backward_in_time(b * BLOCK, begin, end);
    end = begin;
  }
  backward_in_time(-1, p_.window.sink, end);
  if (!b_.dkv0) return;
  for (int i = 0; i < F_; i++)
    memcpy(b_.dkv0 + (at * F_ + i) * V_, dkv_ + i * padded(V_), sizeof(float) * V_);
  memcpy(b_.dksum0 + at * F_, dksum_, sizeof(float) * F_);
}

// dk or dv: the state heads' parts of each kv head, added up and rounded once.
void store_key_gradients(const lol_tensor& out, const float* parts, const Problem& p,
                         const Batch& batch) {
  const int64_t T = out.shape[2], Hk = p.kv_heads(), Hs = p.state_heads(), shared = Hs / Hk;
  const int ld = padded(out.shape[3]);
  run_workers(batch.count * Hk, ld, batch.real_tokens * Hs * ld, [&](int64_t w, Arena arena) {
    const Sequence& s = batch.sequences[w / Hk];
    const Tokens to = tokens_of(out, s, w % Hk);
    float* sum = arena.take(ld);
    for (int64_t i = 0; i < s.tokens; i++) {
      const float* part =
          parts + ((s.batch * Hs + w % Hk * shared) * T + KeyGradients::row(s, i)) * ld;
      memcpy(sum, part, sizeof(float) * ld);
      for (int64_t head = 1; head < shared; head++) {
        for (int j = 0; j < ld; j += LANES)
          store(sum + j, load(sum + j) + load(part + head * T * ld + j));
      }
      store_row(to.row(i), sum, to.width, to.dtype);
    }
  });
}

}  // namespace

int backward(const BackwardProblem& b, const Batch& batch, const ParameterPartials& partials) {
  const Problem& p = b.p;
  const int64_t T = p.q.shape[2], rows = b.dq.data ? p.q.shape[0] * p.state_heads() * T : 0;
  Buffer dk(rows * padded(p.D())), dv(rows * padded(p.V()));
  if (!dk.ok() || !dv.ok() || !partials.ok()) return LOL_ENOMEM;
  const KeyGradients keys = {dk.data, dv.data, T};
  const auto prepare = [&] {
    if (!batch.padded) return;
    clear(b.dq);
    clear(b.dk);
    clear(b.dv);
  };
  const auto work = [&](int64_t w, Arena arena) {
    for (int64_t i = partials.begin(w); i < partials.end(w); i++) {
      Arena own = arena;
      BackwardWorker(b, batch.sequences[i], partials.state_head(w), keys, partials, w, own).run();
    }
  };
  const int status = run_workers(partials.workers(), BackwardWorker::floats(p),
                                 3 * p.work(batch.real_tokens), work, prepare);
  if (status == LOL_OK && rows) {
    store_key_gradients(b.dk, dk.data, p, batch);
    store_key_gradients(b.dv, dv.data, p, batch);
  }
  return status;
}

int backward(const BackwardProblem& b, const Batch& batch) {
  const ParameterPartials partials(b.p, batch);
  const int status = backward(b, batch, partials);
  if (status == LOL_OK) partials.reduce(b.parameters);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
