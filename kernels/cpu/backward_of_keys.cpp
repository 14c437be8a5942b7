// The pass backward in time.
#include "backward_pass.h"

namespace lol {
namespace LOL_ISA {
namespace {

class KeyGradients {
 public:
  static int64_t floats(const Problem& p) {
    return QueryBlock::floats(p) + BackwardMap::floats(p) + 4 * lanes_size(p.F() + 1) +
           2 * rows_size(p.D()) + lanes_size(p.D()) +
           2 * at_least(lanes_size(p.V()), rows_size(p.V())) + 2 * (p.F() + 1) * padded(p.V()) +
           2 * p.F() + padded(p.V()) + 3 * BLOCK * BLOCK + MapBackward::scratch_size(p.D(), p.f()) +
           64;
  }
  // With `new_delta` delta is computed, not read.
  KeyGradients(const BackwardRun& run, float* new_delta, Arena& arena)
      : run_(run),
        p_(run.p),
        pace_(p_.pace()),
        format_(run.p.format),
        D_((int)run.p.D()),
        V_((int)run.p.V()),
        F_((int)run.p.F()),
        block_(run, new_delta, arena),
        map_(BackwardMap::of(p_, p_.map_k(run.state_head), arena)) {
    keys_ = arena.take(lanes_size(D_));
    k_rows_ = arena.take(rows_size(D_));
    values_ = arena.take(lanes_size(V_));
    phi_ = arena.take(lanes_size(F_));
    dphi_ = arena.take(lanes_size(F_));
    dkv_ = arena.take(F_ * padded(V_));
    dksum_ = arena.take(F_);
    scores_ = arena.take(BLOCK * BLOCK);
    by_query_ = arena.take(BLOCK * BLOCK);
    by_key_ = arena.take(BLOCK * BLOCK);
    scratch_ = arena.take(
        at_least(MapBackward::scratch_size(D_, p_.f()), at_least(rows_size(D_), rows_size(V_))));
    phi_words_ = phi_;
    q_words_ = q_by_token_ = block_.phi;
    dkv_words_ = dkv_by_value_ = dkv_;
    dksum_and_lost_ = dksum_;
    if (format_ == Format::f32) return;
    mean_ = arena.take(padded(V_));
    dksum_and_lost_ = arena.take(F_);
    phi_words_ = arena.take(lanes_size(F_ + 1) / 2);
    q_words_ = arena.take(lanes_size(F_ + 1) / 2);
    q_by_token_ = arena.take(lanes_size(F_ + 1) / 2);
    dkv_words_ = arena.take((F_ + 1) / 2 * padded(V_));
    dkv_by_value_ = arena.take(F_ * padded(V_) / 2);
  }

  void run(StateSums after, StateSums before);
  void borders(const Segments& segments, StateSums final_gradient, const SegmentStates& to);

 private:
  void load_dstate(StateSums from);
  void store_dstate(StateSums to) const;
  void step(int64_t first, int64_t begin, int64_t end);
  void load_queries(int64_t h, int64_t first);
  void begin_tile(int64_t start, int64_t n);
  void correct_dksum();
  void prefetch(int64_t start) const;
  void mixed_part(const Band& band);
  void finish_tile();
  void absorb_queries();
  void dstate_changed();
  Operand phi_q_by_token() const {
    return rows(q_by_token_, format_ == Format::f32 ? BLOCK : BLOCK / 2);
  }

  const BackwardRun& run_;
  const Problem& p_;
  const Pace pace_;
  const Format format_;
  const int D_, V_, F_;
  QueryBlock block_;  // its phi times lambda / den
  const BackwardMap map_;

  // The keys [start_, start_ + n_).
  int64_t start_, n_;
  float *keys_, *k_rows_, *values_;  // keys both ways; [V x BLOCK] or pairs along V
  float *phi_, *dphi_;               // [F x BLOCK], fp32
  // The gradient of the state that the queries from here on leave.
  bool has_dstate_ = false;
  float *dkv_, *dksum_;  // [F x padded(V)], [F]
  // The same in pairs: phi_k and phi_q along F, phi_q along tokens, dkv along F and along V. In
  // fp32 they are what they are made of.
  float *phi_words_, *q_words_, *q_by_token_, *dkv_words_, *dkv_by_value_;
  float *mean_, *dksum_and_lost_;  // correct_dksum(): [padded(V)], [F]
  float *scores_, *by_query_, *by_key_, *scratch_;
};

void KeyGradients::load_queries(int64_t h, int64_t first) {
  block_.load(h, first);
  block_.prefetch(h, first - BLOCK);
  const float lambda = p_.lambda(h);
  for (int c = 0; c < BLOCK; c += LANES) {
    const Vec factor = lambda * load(block_.by_den + c);
    for (int i = 0; i < F_; i++) {
      float* phi = block_.phi + i * BLOCK + c;
      store(phi, factor * load(phi));
    }
  }
  if (format_ == Format::f32) return;
  pair_both_ways(q_words_, q_by_token_, block_.phi, F_, BLOCK);
}

// Loads n keys, with dphi_k and dv from the queries whose gradient is in (dkv, dksum).
void KeyGradients::begin_tile(int64_t start, int64_t n) {
  start_ = start;
  n_ = n;
  load_both_ways(keys_, k_rows_, run_.keys(), start, n, format_, scratch_);
  load_lanes(values_, run_.values(), start, n, format_, scratch_);
  features_forward(map_.map, keys_, phi_);
  if (format_ != Format::f32) pair_rows(phi_words_, phi_, F_, BLOCK);
  if (!has_dstate_) {
    memset(dphi_, 0, sizeof(float) * F_ * BLOCK);
    return;
  }
  const int ldv = padded(V_);
  if (format_ != Format::f32) correct_dksum();
  const Operand dkv = rows(dkv_by_value_, format_ == Format::f32 ? ldv : ldv / 2);
  gemm(format_, F_, BLOCK, V_, dkv, values_, BLOCK, dphi_, BLOCK, Into::set);
  for (int i = 0; i < F_; i++) {
    for (int c = 0; c < BLOCK; c += LANES)
      store(dphi_ + i * BLOCK + c, load(dphi_ + i * BLOCK + c) + dksum_and_lost_[i]);
  }
  if (run_.wants_inputs())
    gemm(format_, (int)n, ldv, F_, transposed(phi_words_, BLOCK), dkv_words_, ldv,
         run_.dv_at(start), ldv, Into::add);
}

// dksum with what dkv lacks in pairs, times the mean of the values at hand: gradients are small
// differences of dksum and of dkv's products with what values have in common.
void KeyGradients::correct_dksum() {
#ifdef LOL_PAIRS
  const int ldv = padded(V_);
  fill(mean_, ldv, 0.0f);
  for (int v = 0; v < V_; v += 2) {
    const float* words = values_ + v / 2 * BLOCK;
    Vec first = {}, second = {};
    for (int c = 0; c < BLOCK; c += LANES) {
      first += first_of(load(words + c));
      second += second_of(load(words + c));
    }
    mean_[v] = horizontal_sum(first) / (float)n_;
    if (v + 1 < V_) mean_[v + 1] = horizontal_sum(second) / (float)n_;
  }
  add_what_rounding_took(dksum_and_lost_, dksum_, dkv_, (const uint16_t*)dkv_by_value_, mean_, F_,
                         ldv);
#endif
}

// A tile of keys, and what the pass forward in time has left of their gradients.
void KeyGradients::prefetch(int64_t start) const {
  const int64_t n = at_most(BLOCK, run_.s.tokens - start);
  if (start < run_.first_key || n <= 0) return;
  request_rows(run_.keys(), start, n);
  request_rows(run_.values(), start, n);
  if (!run_.wants_inputs()) return;
  const auto request_part = [&](const float* first, int64_t floats) {
    const int64_t bytes = floats * (int64_t)sizeof(float);
    Requests::of_thread().add(WantedRows::at((const char*)first, bytes, n, bytes));
  };
  request_part(run_.dv_at(start), padded(V_));
  request_part(run_.dk_at(start), padded(D_));
}

// dphi_k and dv from the queries at hand that see some of the keys as linear.
void KeyGradients::mixed_part(const Band& band) {
  const int n = (int)n_, ldv = padded(V_);
  const bool pairs = format_ != Format::f32;
  const Band queries = of_rows(band);
  if (run_.wants_inputs()) {
    gemm(format_, n, BLOCK, F_, transposed(phi_words_, BLOCK), q_words_, BLOCK, scores_, BLOCK,
         Into::set, Skip::outputs, &band);
    keep_band(scores_, band, n);
    if (pairs) pair_columns(by_query_, scores_, n);
    gemm(format_, n, ldv, BLOCK, pairs ? rows(by_query_, BLOCK / 2) : rows(scores_, BLOCK),
         block_.dy_rows, ldv, run_.dv_at(start_), ldv, Into::add, Skip::depth_of_row, &queries);
  }
  gemm(format_, n, BLOCK, V_, transposed(values_, BLOCK), block_.dy, BLOCK, scores_, BLOCK,
       Into::set, Skip::outputs, &band);
  for (int c = 0; c < BLOCK; c += LANES) {
    const Vec delta = load(block_.delta + c);
    clear_outside(scores_, band, c, BLOCK);
    for_band(band, c, [&](int j, auto keep) {
      float* d = scores_ + j * BLOCK + c;
      store(d, keep(load(d) - delta));
    });
  }
  if (pairs) pair_columns(by_query_, scores_, BLOCK);
  to_lanes(by_key_, pairs ? by_query_ : scores_, words(format_, BLOCK));
  gemm(format_, F_, BLOCK, BLOCK, phi_q_by_token(), by_key_, BLOCK, dphi_, BLOCK, Into::add,
       Skip::depth_of_column, &queries);
}

void KeyGradients::finish_tile() {
  for (int i = 0; i < F_; i++) {
    for (int64_t j = n_; j < BLOCK; j++) dphi_[i * BLOCK + j] = 0.0f;
  }
  features_backward(
      map_.map,
      {k_rows_, keys_, phi_, map_.weight_t, run_.partials.k(run_.slot, run_.state_head),
       run_.wants_inputs() ? run_.dk_at(start_) : nullptr, n_, scratch_},
      dphi_);
}

// The queries at hand into dkv and dksum.
void KeyGradients::absorb_queries() {
  const int ldv = padded(V_);
  gemm(format_, F_, ldv, BLOCK, phi_q_by_token(), block_.dy_rows, ldv, dkv_, ldv, Into::add);
  float less_delta[BLOCK];
  for (int c = 0; c < BLOCK; c++) less_delta[c] = -block_.delta[c];
  add_weighted_rows(format_, dksum_, q_by_token_, less_delta, F_);
}

void KeyGradients::dstate_changed() {
  has_dstate_ = true;
  if (format_ == Format::f32) return;
  pair_both_ways(dkv_words_, dkv_by_value_, dkv_, F_, padded(V_));
}

// The keys [begin, end), which the block of queries at `first` and earlier ones see by softmax or
// as linear, later ones as linear; then that block joins (dkv, dksum). first < 0: keys that every
// query sees as linear.
void KeyGradients::step(int64_t first, int64_t begin, int64_t end) {
  const int64_t h0 = run_.first_head(), last = at_most(first + BLOCK, run_.s.tokens) - 1;
  for (int64_t start = begin; start == begin || start < end; start += BLOCK) {
    const bool keys = start < end, at_end = start + BLOCK >= end;
    const bool mixed = keys && first >= 0 && start < p_.window.start(last);
    if (keys) {
      begin_tile(start, at_most(BLOCK, end - start));
      prefetch(start + BLOCK < end ? start + BLOCK : begin - BLOCK);
    }
    // A block is loaded once for its last tile of keys, usually the only one, and for (dkv, dksum).
    for (int64_t h = h0; first >= 0 && (mixed || at_end) && h < h0 + p_.group(); h++) {
      load_queries(h, first);
      if (mixed) mixed_part(linear_band({p_.window, first, last - first + 1}, start, n_));
      if (at_end) absorb_queries();
    }
    if (keys) finish_tile();
  }
  if (first >= 0) dstate_changed();
}

void KeyGradients::load_dstate(StateSums from) {
  const int ld = padded(V_);
  memset(dkv_, 0, sizeof(float) * F_ * ld);
  memset(dksum_, 0, sizeof(float) * F_);
  for (int i = 0; from.kv && i < F_; i++)
    memcpy(dkv_ + i * ld, from.kv + i * V_, sizeof(float) * V_);
  if (from.ksum) memcpy(dksum_, from.ksum, sizeof(float) * F_);
  if (from.kv || from.ksum) dstate_changed();
}

void KeyGradients::store_dstate(StateSums to) const {
  for (int i = 0; i < F_; i++) memcpy(to.kv + i * V_, dkv_ + i * padded(V_), sizeof(float) * V_);
  memcpy(to.ksum, dksum_, sizeof(float) * F_);
}

void KeyGradients::run(StateSums after, StateSums before) {
  load_dstate(after);
  const int64_t tokens = run_.s.tokens;
  const Segment& segment = run_.segment;
  // Keys that no later block takes as linear matter to the last block alone, unless the final state
  // has a gradient.
  int64_t end = tokens;
  if (!run_.last()) end = at_most(p_.window.start(segment.end), tokens);
  if (run_.last() && !has_dstate_) end = at_most(p_.window.start(tokens - 1), tokens);
  for (int64_t first = (segment.end - 1) / BLOCK * BLOCK; first >= segment.begin && first < tokens;
       first -= BLOCK) {
    const int64_t begin = at_most(p_.window.start(first), end);
    step(first, begin, end);
    end = begin;
  }
  if (segment.begin == 0) step(-1, p_.window.sink, end);
  if (before.kv) store_dstate(before);
}

void KeyGradients::borders(const Segments& segments, StateSums final_gradient,
                           const SegmentStates& to) {
  load_dstate(final_gradient);
  for (int64_t j = segments.count(run_.s) - 1; j > 0; j--) {
    const Segment segment = segments.at(run_.s, j);
    for (int64_t first = (segment.end - 1) / BLOCK * BLOCK; first >= segment.begin;
         first -= BLOCK) {
      for (int64_t h = run_.first_head(); h < run_.first_head() + p_.group(); h++) {
        load_queries(h, first);
        absorb_queries();
      }
    }
    store_dstate(to.at(run_.s, j - 1, run_.state_head));
  }
}

}  // namespace

int64_t backward_of_keys_floats(const Problem& p) { return KeyGradients::floats(p); }
void backward_of_keys(const BackwardRun& run, StateSums after, StateSums before, Arena arena) {
  KeyGradients(run, nullptr, arena).run(after, before);
}
void gradients_after(const BackwardRun& run, const Segments& segments, StateSums final_gradient,
                     const SegmentStates& to, Arena arena) {
  KeyGradients(run, run.new_delta, arena).borders(segments, final_gradient, to);
}

}  // namespace LOL_ISA
}  // namespace lol
