// hybrid_attention_step_ (SPEC 5): T new tokens on recurrent states, in place.
//
// T > 1 runs the chunkwise forward on the ring's tokens followed by the new ones. T = 1 is the
// decode step, bound by reading and writing the state once: 8 F V bytes, 2 (2 D f + 2 F V + w (D +
// V)) FLOPs per head; lanes run along features and values.
#include "forward.h"
#include "kernels.h"

namespace lol {
namespace LOL_ISA {
namespace {

struct Step {
  explicit Step(const lol_hybrid_attention_step_args& args)
      : a(args), p(problem_of(args)), chunks(p.by_pairs()) {
    ring = a.state.k_ring.shape[2];
    slack = ring - window_span(a.window, a.window_kind) - a.lazy;
  }

  int64_t length(const Sequence& s) const { return ((const int64_t*)a.state.length.data)[s.slot]; }
  int64_t folded(const Sequence& s) const { return ((const int64_t*)a.state.folded.data)[s.slot]; }
  // Positions in (kv, ksum) once `total` tokens have come. Tokens are folded when the ring has no
  // room for them, and then all that no query would need after `slack` tokens are taken back.
  int64_t folded_after(const Sequence& s, int64_t total) const {
    if (total - folded(s) <= ring) return folded(s);
    const Window without_sink = {p.window.size, p.window.kind, 0};
    return at_least(folded(s), without_sink.start(total - 1 - slack));
  }
  float* kv(const Sequence& s, int64_t state_head) const {
    return (float*)a.state.kv.data + (s.slot * p.state_heads() + state_head) * p.F() * p.V();
  }
  float* ksum(const Sequence& s, int64_t state_head) const {
    return (float*)a.state.ksum.data + (s.slot * p.state_heads() + state_head) * p.F();
  }
  Tokens tokens(const lol_tensor& t, const lol_tensor& rings, const lol_tensor& sinks,
                const Sequence& s, int64_t kv_head) const {
    Tokens tokens = tokens_of(t, s, kv_head);
    const int64_t at = (s.slot * p.kv_heads() + kv_head) * tokens.row_bytes();
    tokens.past = length(s);
    tokens.ring = (char*)rings.data + at * ring;
    tokens.sink = (char*)sinks.data + at * p.window.sink;
    tokens.ring_size = ring;
    return tokens;
  }
  Tokens keys(const Sequence& s, int64_t kv_head) const {
    return tokens(a.k, a.state.k_ring, a.state.k_sink, s, kv_head);
  }
  Tokens values(const Sequence& s, int64_t kv_head) const {
    return tokens(a.v, a.state.v_ring, a.state.v_sink, s, kv_head);
  }

  const lol_hybrid_attention_step_args& a;
  Problem p;
  Problem chunks;  // of many_tokens
  int64_t ring, slack;
};

// What T > 1 tokens of a sequence do to one state head.
Run many_tokens(const Step& step, const Sequence& s, int64_t state_head) {
  const int64_t past = step.length(s), total = past + s.tokens;
  const int64_t kv_head = step.p.kv_head_of(state_head);
  float *kv = step.kv(s, state_head), *ksum = step.ksum(s, state_head);
  const int64_t folded = at_least(step.folded(s), step.p.window.sink);
  Run run = {};
  run.sequence = &s;
  run.state_head = state_head;
  run.k = step.keys(s, kv_head);
  run.v = step.values(s, kv_head);
  run.past = past;
  run.total = total;
  run.kv = run.final_kv = kv;
  run.ksum = run.final_ksum = ksum;
  run.folded = folded;
  run.fold = at_least(step.folded_after(s, total), folded);
  return run;
}

void add_scaled(float* to, float factor, const float* x, int n) {
  for (int i = 0; i < n; i += LANES) store(to + i, load(to + i) + factor * load(x + i));
}

// One token of a sequence for one state head and the query heads that share it. Nothing is
// allocated.
class OneToken {
 public:
  static int64_t floats(const Problem& p, int64_t ring) {
    return 2 * padded(p.D()) + padded(p.V()) * (1 + p.group()) + p.F() * (1 + p.group()) +
           p.group() + keys(p, ring) +
           2 * keys(p, ring) * (int64_t)(sizeof(char*) / sizeof(float)) + LANES;
  }
  // The most that a token attends by softmax, rounded up to the four that are taken at a time.
  static int64_t keys(const Problem& p, int64_t ring) { return ring + p.window.sink + 1 + LANES; }

  OneToken(const Step& step, const Sequence& s, int64_t state_head, Arena arena)
      : step_(step),
        p_(step.p),
        s_(s),
        state_head_(state_head),
        position_(step.length(s)),
        keys_(step.keys(s, p_.kv_head_of(state_head))),
        values_(step.values(s, p_.kv_head_of(state_head))),
        D_((int)p_.D()),
        V_((int)p_.V()),
        F_((int)p_.F()),
        G_((int)p_.group()) {
    q_ = arena.take(padded(D_));
    k_ = arena.take(padded(D_));
    v_ = arena.take(padded(V_));
    phi_k_ = arena.take(F_);
    phi_q_ = arena.take(G_ * F_);
    o_ = arena.take(G_ * padded(V_));
    linear_ = arena.take(G_);
    scores_ = arena.take(keys(p_, step.ring));
    constexpr int64_t WORDS = sizeof(char*) / sizeof(float);
    key_rows_ = (const char**)arena.take(keys(p_, step.ring) * WORDS);
    value_rows_ = (const char**)arena.take(keys(p_, step.ring) * WORDS);
  }

  void run() {
    memset(o_, 0, sizeof(float) * G_ * padded(V_));  // the tail of V adds up in place
    memset(linear_, 0, sizeof(float) * G_);
    for (int g = 0; g < G_; g++) {
      load_row(q_, tokens_of(p_.q, s_, head(g)).row(0), D_, p_.q.dtype);
      features_of_token(p_.map_q(head(g)), q_, phi_q_ + g * F_);
    }
    const int64_t fold_to = at_least(step_.folded_after(s_, position_ + 1), p_.window.sink);
    int64_t position = at_least(step_.folded(s_), p_.window.sink);
    // All but the last of the leaving tokens go into the state unread; the last one in the pass
    // that reads the state.
    for (; position + 1 < fold_to; position++) fold(position);
    read_state(position < fold_to ? position : -1);
    for (position = at_least(position, fold_to); position < p_.window.start(position_); position++)
      read_token(position);
    find_window();
    for (int g = 0; g < G_; g++) finish(g);
  }

 private:
  int64_t head(int g) const { return state_head_ * G_ + g; }
  void load_token(int64_t position) {
    load_row(k_, keys_.row(position), D_, keys_.dtype);
    load_row(v_, values_.row(position), V_, values_.dtype);
    features_of_token(p_.map_k(state_head_), k_, phi_k_);
  }

  void fold(int64_t position) {
    load_token(position);
    float *kv = step_.kv(s_, state_head_), *ksum = step_.ksum(s_, state_head_);
    for (int i = 0; i < F_; i++) {
      ksum[i] += phi_k_[i];
      for (int j = 0; j < V_; j++) kv[i * V_ + j] += phi_k_[i] * v_[j];
    }
  }

  // o += phi_q kv and linear += phi_q ksum, folding the token at `leaving` (or none, -1) on the
  // way: one pass over the state, in slices of 4 vectors of V whose sums stay in registers; the
  // other heads of a group find the slice in L1.
  void read_state(int64_t leaving) {
    if (leaving >= 0) {
      load_token(leaving);
    } else {
      memset(phi_k_, 0, sizeof(float) * F_);
      memset(v_, 0, sizeof(float) * padded(V_));
    }
    float *kv = step_.kv(s_, state_head_), *ksum = step_.ksum(s_, state_head_);
    int j = 0;
    for (; j + 4 * LANES <= V_; j += 4 * LANES) read_slice<4>(kv + j, j);
    for (; j + LANES <= V_; j += LANES) read_slice<1>(kv + j, j);
    for (; j < V_; j++) {
      for (int i = 0; i < F_; i++) {
        float& x = kv[(int64_t)i * V_ + j];
        x += phi_k_[i] * v_[j];
        for (int g = 0; g < G_; g++) o_[g * padded(V_) + j] += phi_q_[g * F_ + i] * x;
      }
    }
    int i = 0;
    for (; i + LANES <= F_; i += LANES) store(ksum + i, load(ksum + i) + load(phi_k_ + i));
    for (; i < F_; i++) ksum[i] += phi_k_[i];
    for (int g = 0; g < G_; g++) linear_[g] += dot(phi_q_ + g * F_, ksum, F_);
  }

  template <int P>
  void read_slice(float* kv, int j) {
    const int F = F_, V = V_;  // not read anew after every store
    const float* phi_k = phi_k_;
    Vec v[P];
    for (int p = 0; p < P; p++) v[p] = load(v_ + j + p * LANES);
    for (int g = 0; g < G_; g++) {
      const float* phi_q = phi_q_ + g * F;
      Vec sum[P] = {};
      for (int i = 0; i < F; i++) {
        float* row = kv + (int64_t)i * V;
        for (int p = 0; p < P; p++) {
          Vec x = load(row + p * LANES);
          if (g == 0) {
            x += phi_k[i] * v[p];
            store(row + p * LANES, x);
          }
          sum[p] += phi_q[i] * x;
        }
      }
      for (int p = 0; p < P; p++) store(o_ + g * padded(V) + j + p * LANES, sum[p]);
    }
  }

  // A token that has left the window but stays in the ring, within the slack.
  void read_token(int64_t position) {
    load_token(position);
    for (int g = 0; g < G_; g++) {
      const float score = dot(phi_q_ + g * F_, phi_k_, F_);
      linear_[g] += score;
      add_scaled(o_ + g * padded(V_), score, v_, padded(V_));
    }
  }

  // Where the keys and values of the sinks and of the window are: at most four stretches of rows
  // that follow one another.
  void find_window() {
    const int64_t sinks = at_most(p_.window.sink, position_ + 1);
    const int64_t start = p_.window.start(position_), slot = start % at_least(step_.ring, 1);
    const int64_t to_end = at_most(position_ - start, step_.ring - slot);
    keys_in_window_ = 0;
    add_rows(keys_.sink, values_.sink, at_most(sinks, position_));
    if (sinks > position_) add_rows(keys_.row(position_), values_.row(position_), 1);
    add_rows(ring_slot(keys_, slot), ring_slot(values_, slot), to_end);
    add_rows(keys_.ring, values_.ring, position_ - start - to_end);
    if (start <= position_) add_rows(keys_.row(position_), values_.row(position_), 1);
  }
  static const char* ring_slot(const Tokens& t, int64_t slot) {
    return t.ring + slot * t.row_bytes();
  }
  void add_rows(const char* keys, const char* values, int64_t count) {
    const int64_t key_bytes = keys_.row_bytes(), value_bytes = values_.row_bytes();
    const char **key_rows = key_rows_ + keys_in_window_,
               **value_rows = value_rows_ + keys_in_window_;
    for (int64_t i = 0; i < count; i++) key_rows[i] = keys + i * key_bytes;
    for (int64_t i = 0; i < count; i++) value_rows[i] = values + i * value_bytes;
    if (count > 0) keys_in_window_ += count;
  }

  // The softmax part: scores of the sinks and the window, their exponentials, then both parts over
  // one denominator.
  void finish(int g) {
    load_row(q_, tokens_of(p_.q, s_, head(g)).row(0), D_, p_.q.dtype);
    const int64_t keys = keys_in_window_;
    for (int64_t i = 0; i < keys; i += 4) {
      const Vec4 scores = p_.scale * scores_of_4(i);
      memcpy(scores_ + i, &scores, sizeof(scores));
    }
    for (int64_t i = keys; i % LANES; i++) scores_[i] = -INFINITY;
    Vec tops = splat(keys ? -INFINITY : 0.0f), sums = {};
    for (int64_t i = 0; i < keys; i += LANES) tops = max(tops, load(scores_ + i));
    const float m = horizontal_max(tops);
    for (int64_t i = 0; i < keys; i += LANES) {
      const Vec s = load(scores_ + i);
      const Vec e = select(s == splat(-INFINITY), Vec{}, exp_below_one(s - m));
      sums += e;
      store(scores_ + i, e);
    }
    const float sum = horizontal_sum(sums);
    const float gate = p_.g(head(g)), lambda = p_.lambda(head(g));
    const float den = gate * sum + lambda * linear_[g];
    float* o = o_ + g * padded(V_);
    int j = 0;
    for (; j + 4 * LANES <= V_; j += 4 * LANES) add_values<4>(o, j, {lambda, gate, den});
    for (; j < V_; j += LANES) add_values<1>(o, j, {lambda, gate, den});
    store_row(tokens_of(step_.a.o, s_, head(g)).row(0), o, V_, step_.a.o.dtype);
  }

  // q k of four keys from the first one on, past the end of the last key again.
  Vec4 scores_of_4(int64_t first) const {
    const int dtype = keys_.dtype, size = dtype_size(dtype);
    const char* rows[4];
    for (int r = 0; r < 4; r++) rows[r] = key_rows_[at_most(first + r, keys_in_window_ - 1)];
    Vec dots[4] = {};
    int d = 0;
    for (; d + LANES <= D_; d += LANES) {
      const Vec q = load(q_ + d);
      for (int r = 0; r < 4; r++) dots[r] += q * load_converted(rows[r] + d * size, dtype);
    }
    for (int r = 0; r < 4 && d < D_; r++) {
      float tail[LANES];
      load_row(tail, rows[r] + d * size, D_ - d, dtype);
      dots[r] += load(q_ + d) * load(tail);
    }
    return sums_of_4(dots);
  }

  struct Blend {
    float linear, softmax, den;
  };
  // o = (linear o + softmax sum scores v) / den over the columns [j, j + P LANES) of the values,
  // whose sums stay in registers while the keys pass. Only a last vector, P = 1, may be cut short.
  template <int P>
  void add_values(float* o, int j, Blend by) {
    const int dtype = values_.dtype, size = dtype_size(dtype);
    Vec sum[P] = {};
    if (j + P * LANES <= V_) {
      for (int64_t i = 0; i < keys_in_window_; i++) {
        for (int p = 0; p < P; p++)
          sum[p] += scores_[i] * load_converted(value_rows_[i] + (j + p * LANES) * size, dtype);
      }
    } else {
      for (int64_t i = 0; i < keys_in_window_; i++) {
        load_row(v_, value_rows_[i] + j * size, V_ - j, dtype);
        sum[0] += scores_[i] * load(v_);
      }
    }
    for (int p = 0; p < P; p++) {
      float* to = o + j + p * LANES;
      store(to, (by.linear * load(to) + by.softmax * sum[p]) / by.den);
    }
  }

  const Step& step_;
  const Problem& p_;
  const Sequence& s_;
  const int64_t state_head_, position_;
  const Tokens keys_, values_;
  const int D_, V_, F_, G_;
  float *q_, *k_, *v_, *phi_k_, *phi_q_, *o_, *linear_, *scores_;
  const char **key_rows_, **value_rows_;
  int64_t keys_in_window_;
};

// After all heads have read the old ring: the new tokens' keys or values go into ring and sinks.
void remember(const Step& step, const Sequence& s, const Tokens& t) {
  const int64_t past = step.length(s), total = past + s.tokens;
  for (int64_t i = past; i < at_most(total, step.p.window.sink); i++) {
    memcpy((char*)t.sink + i * t.row_bytes(), t.row(i), t.row_bytes());
  }
  for (int64_t i = at_least(past, total - step.ring); i < total; i++) {
    memcpy((char*)t.ring + i % step.ring * t.row_bytes(), t.row(i), t.row_bytes());
  }
}

}  // namespace

int hybrid_attention_step(const lol_hybrid_attention_step_args& a, const Batch& batch) {
  const Step step(a);
  const Problem& p = step.p;
  const auto one_token = [&](int64_t w, Arena arena) {
    const Sequence& s = batch.sequences[w / p.state_heads()];
    if (s.tokens) OneToken(step, s, w % p.state_heads(), arena).run();
  };
  const Outputs out = {a.o, nullptr, nullptr};
  const int status =
      a.q.shape[2] == 1
          ? run_workers<Threads::same>(batch.count * p.state_heads(),
                                       OneToken::floats(p, step.ring), p.work(batch.real_tokens),
                                       one_token,
                                       [&] { clear_padding(batch, a.o, nullptr, nullptr); })
          : forward(step.chunks, batch, out, [&](const Sequence& s, int64_t state_head) {
              return many_tokens(step, s, state_head);
            });
  if (status != LOL_OK) return status;
  for (int64_t i = 0; i < batch.count; i++) {
    const Sequence& s = batch.sequences[i];
    if (s.tokens == 0) continue;
    for (int64_t kv_head = 0; kv_head < p.kv_heads(); kv_head++) {
      remember(step, s, step.keys(s, kv_head));
      remember(step, s, step.values(s, kv_head));
    }
    const int64_t total = step.length(s) + s.tokens;
    ((int64_t*)a.state.folded.data)[s.slot] = step.folded_after(s, total);
    ((int64_t*)a.state.length.data)[s.slot] = total;
  }
  return LOL_OK;
}

}  // namespace LOL_ISA
}  // namespace lol
