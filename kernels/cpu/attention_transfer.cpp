// attention_transfer (SPEC 7): teacher = causal softmax attention, student = hybrid attention on
// the same q, k, v, and how far apart they are. Both are streamed over tiles. FLOPs per head: 2 T^2
// (D + V) / 2 for the teacher beside the hybrid's; with the cross-entropy T^2 (D + F) / 2 more for
// every pair of a query and a key, once forward and three times backward.
#include "backward.h"
#include "kernels.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {
namespace {

constexpr float LEAST_WEIGHT = 1e-12f;  // the logarithm's floor

// The teacher walks all earlier keys; four tiles at a time keep its scores (64 KiB) in L2 beside
// the student's state.
constexpr int TEACHER_TILES = 4;

Window everything() { return {INT64_MAX / 4, LOL_SLIDING, 0}; }

// Teacher's and student's normalised weights of one tile of keys, and which keys the student sees
// as linear.
struct PairWeights {
  float *teacher, *student;  // [BLOCK x BLOCK], zero above the diagonal
  Band causal, linear;
};

class Pairs {
 public:
  static int64_t floats(const Problem& p) {
    return KeyTiles::floats(p, TEACHER_TILES) + 2 * BLOCK * BLOCK;
  }
  Pairs(const Problem& p, int64_t state_head, const Sequence& s, Arena& arena)
      : tiles(p, TEACHER_TILES, tokens_of(p.k, s, p.kv_head_of(state_head)),
              tokens_of(p.v, s, p.kv_head_of(state_head)), p.map_k(state_head), s.tokens, arena),
        p_(p) {
    w.teacher = arena.take(BLOCK * BLOCK);
    w.student = arena.take(BLOCK * BLOCK);
  }

  KeyTile& weigh(int64_t start, const Queries& block, int64_t h, const float* m, const float* den,
                 const float* lse) {
    KeyTile& tile = tiles.at(start);
    const int64_t sink = p_.window.sink;
    w.causal = causal_band(start, tile.n, block.first, block.n);
    w.linear = make_band(
        start, tile.n, block.first, block.n, [&](int64_t) { return sink; },
        [&](int64_t i) { return p_.window.start(i); });
    gemm((int)tile.n, BLOCK, (int)p_.D(), transposed(tile.keys, BLOCK), block.q, BLOCK, w.teacher,
         BLOCK, Into::set);
    linear_scores(tiles, tile, block, (int)p_.F(), w.linear, w.student);
    const float g = p_.g(h), lambda = p_.lambda(h);
    for (int j = 0; j < tile.n; j++) {
      for (int c = 0; c < BLOCK; c += LANES) {
        const int at = j * BLOCK + c;
        const VecI seen = in_band(w.causal, c, j);
        const Vec s = p_.scale * load(w.teacher + at);
        const Vec unnormalised = select(in_band(w.linear, c, j), lambda * load(w.student + at),
                                        g * exp(s - load(m + c)));
        store(w.student + at, select(seen, unnormalised / load(den + c), Vec{}));
        store(w.teacher + at, select(seen, exp(s - load(lse + c)), Vec{}));
      }
    }
    return tile;
  }

  KeyTiles tiles;
  PairWeights w;

 private:
  const Problem& p_;
};

// sum_j a*_ij log max(a_ij, 1e-12) of the block, query by query.
double cross_entropy(Pairs& pairs, const Queries& block, int64_t h, const float* m,
                     const float* den, const float* lse) {
  float sum[BLOCK] = {};
  for (int64_t start = 0; start < block.first + block.n; start += BLOCK) {
    const KeyTile& tile = pairs.weigh(start, block, h, m, den, lse);
    for (int c = 0; c < BLOCK; c += LANES) {
      Vec total = load(sum + c);
      for (int at = c; at < tile.n * BLOCK; at += BLOCK) {
        total -=
            load(pairs.w.teacher + at) * log(max(load(pairs.w.student + at), splat(LEAST_WEIGHT)));
      }
      store(sum + c, total);
    }
  }
  double result = 0.0;
  for (int64_t i = 0; i < block.n; i++) result += sum[i];
  return result;
}

// Copies a block's statistics out of [B, H, T]; `fallback` for the padding of a short block.
void load_statistics(const lol_tensor& from, const Problem& p, const Sequence& s, int64_t h,
                     const Queries& block, float fallback, float* to) {
  const float* row0 = (const float*)from.data + (s.batch * p.heads() + h) * p.q.shape[2];
  for (int64_t i = 0; i < BLOCK; i++) to[i] = i < block.n ? row0[s.row(block.first + i)] : fallback;
}

class TransferWorker {
 public:
  static int64_t floats(const Problem& p) {
    return Chunkwise::floats(p) + Pairs::floats(p) + lanes_size(p.V()) + rows_size(p.V());
  }
  TransferWorker(const lol_attention_transfer_args& a, const Problem& p, const Sequence& s,
                 int64_t state_head, Arena& arena)
      : a_(a),
        p_(p),
        s_(s),
        state_head_(state_head),
        student_(p, state_head, s.tokens, tokens_of(p.k, s, p.kv_head_of(state_head)),
                 tokens_of(p.v, s, p.kv_head_of(state_head)), arena),
        pairs_(p, state_head, s, arena) {
    teacher_.o = arena.take(lanes_size(p.V()));
    rows_ = arena.take(rows_size(p.V()));
  }

  void run(double* squares, double* entropy) {
    const int64_t h0 = state_head_ * p_.group();
    for (int64_t first = 0; first < s_.tokens; first += BLOCK) {
      student_.fold(p_.window.start(first));
      for (int64_t h = h0; h < h0 + p_.group(); h++) block(first, h, squares, entropy);
    }
  }

 private:
  void block(int64_t first, int64_t h, double* squares, double* entropy) {
    const int V = (int)p_.V();
    const Queries block =
        student_.load_queries(h, first, at_most(BLOCK, s_.tokens - first), tokens_of(p_.q, s_, h));
    float m[BLOCK], den[BLOCK], lse[BLOCK], delta[BLOCK];
    float* y = const_cast<float*>(student_.attend(block, h, m, den));
    attend_softmax(pairs_.tiles, everything(), block, (int)p_.D(), V, p_.scale, student_.scores,
                   teacher_);
    for (int c = 0; c < BLOCK; c += LANES) {
      store(lse + c, load(teacher_.m + c) + log(load(teacher_.sum + c)));
      const Vec factor = 1.0f / load(teacher_.sum + c);
      Vec dot = {};
      for (int at = c; at < V * BLOCK; at += BLOCK) {
        const Vec t = factor * load(teacher_.o + at), residual = load(y + at) - t;
        dot += residual * load(y + at);
        store(teacher_.o + at, t);
        store(y + at, residual);
      }
      store(delta + c, dot);
    }
    to_rows(rows_, teacher_.o, V);
    store_rows(tokens_of(a_.teacher, s_, h), first, block.n, rows_);
    to_rows(rows_, y, V);
    store_rows(tokens_of(a_.residual, s_, h), first, block.n, rows_);
    for (int64_t i = 0; i < block.n; i++) {
      for (int j = 0; j < V; j++)
        *squares += (double)rows_[i * padded(V) + j] * rows_[i * padded(V) + j];
    }
    const int64_t row0 = (s_.batch * p_.heads() + h) * p_.q.shape[2];
    for (int64_t i = 0; i < block.n; i++) {
      const int64_t row = row0 + s_.row(first + i);
      ((float*)a_.student.m.data)[row] = m[i];
      ((float*)a_.student.den.data)[row] = den[i];
      ((float*)a_.lse.data)[row] = lse[i];
      ((float*)a_.delta.data)[row] = delta[i];
    }
    if (a_.with_xent) *entropy += cross_entropy(pairs_, block, h, m, den, lse);
  }

  const lol_attention_transfer_args& a_;
  const Problem& p_;
  const Sequence& s_;
  const int64_t state_head_;
  Chunkwise student_;
  Pairs pairs_;
  SoftmaxSums teacher_;
  float* rows_;
};

// Gradient of the cross-entropy. With a = u / den, u the unnormalised weight: d xent_i / d u_ij =
// (c_i - a*_ij / a_ij) / den_i, the second term where a_ij > 1e-12 only, and c_i the teacher's
// weight there. So lambda (phi_q . phi_k) and the gate get their gradients like those of mse, but
// for every pair.
class EntropyBackwardWorker {
 public:
  static int64_t floats(const Problem& p, int64_t most_tokens) {
    const int64_t f_rows = has_map(p.feature_k) ? rows_size(p.feature_k.weight.shape[2]) : 0;
    return Pairs::floats(p) + Chunkwise::floats(p) + 2 * lanes_size(p.F()) +
           at_least(f_rows, BLOCK * BLOCK) + p.group() * most_tokens;
  }
  EntropyBackwardWorker(const lol_attention_transfer_args& a, const Problem& p, const Sequence& s,
                        int64_t state_head, float factor, const ParameterPartials& partials,
                        int64_t worker, Arena& arena)
      : a_(a),
        p_(p),
        s_(s),
        state_head_(state_head),
        worker_(worker),
        factor_(factor),
        partials_(partials),
        pairs_(p, state_head, s, arena),
        queries_(p, state_head, s.tokens, tokens_of(p.k, s, p.kv_head_of(state_head)),
                 tokens_of(p.v, s, p.kv_head_of(state_head)), arena) {
    dphi_ = arena.take(lanes_size(p.F()));
    const int64_t f_rows = has_map(p.feature_k) ? rows_size(p.feature_k.weight.shape[2]) : 0;
    scratch_ = arena.take(at_least(f_rows, BLOCK * BLOCK));
    above_ = arena.take(p.group() * s.tokens);
  }

  void run() {
    const int64_t h0 = state_head_ * p_.group(), h1 = h0 + p_.group();
    for (int64_t h = h0; h < h1; h++) {
      for (int64_t first = 0; first < s_.tokens; first += BLOCK) queries_part(h, first);
    }
    for (int64_t start = 0; start < s_.tokens; start += BLOCK) keys_part(start, h0, h1);
  }

 private:
  float* above(int64_t h, int64_t first) const {
    return above_ + (h - state_head_ * p_.group()) * s_.tokens + first;
  }

  void load_block(int64_t h, int64_t first) {
    block_ =
        queries_.load_queries(h, first, at_most(BLOCK, s_.tokens - first), tokens_of(p_.q, s_, h));
    load_statistics(a_.student.m, p_, s_, h, block_, 0.0f, m_);
    load_statistics(a_.student.den, p_, s_, h, block_, 1.0f, den_);
    load_statistics(a_.lse, p_, s_, h, block_, 0.0f, lse_);
    memset(c_, 0, sizeof(c_));
  }
  KeyTile& weigh(int64_t start, int64_t h) {
    return pairs_.weigh(start, block_, h, m_, den_, lse_);
  }

  // Replaces the student's weights by factor * den * d xent / d u, and sums u times it over the
  // softmax keys into r.
  void weight_gradients(const KeyTile& tile, float* r) {
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec above = load(c_ + c);
      Vec sum = {};
      for (int j = 0; j < tile.n; j++) {
        const int at = j * BLOCK + c;
        const Vec a = load(pairs_.w.student + at), teacher = load(pairs_.w.teacher + at);
        const Vec ratio = select(a > splat(LEAST_WEIGHT), teacher / a, Vec{});
        const Vec d = select(in_band(pairs_.w.causal, c, j), factor_ * (above - ratio), Vec{});
        sum += select(in_band(pairs_.w.linear, c, j), Vec{}, a * d);
        store(pairs_.w.student + at, d);
      }
      if (r) store(r + c, load(r + c) + sum);
    }
  }

  // The part of a tile's gradients that reaches the features: lambda / den over the linear keys.
  void keep_linear(const KeyTile& tile, int64_t h) {
    const float lambda = p_.lambda(h);
    for (int j = 0; j < tile.n; j++) {
      for (int c = 0; c < BLOCK; c += LANES) {
        float* d = pairs_.w.student + j * BLOCK + c;
        store(d, select(in_band(pairs_.w.linear, c, j), lambda * load(d) / load(den_ + c), Vec{}));
      }
    }
  }

  void queries_part(int64_t h, int64_t first) {
    load_block(h, first);
    const int F = (int)p_.F();
    for (int64_t start = 0; start < first + block_.n; start += BLOCK) {
      const KeyTile& tile = weigh(start, h);
      for (int c = 0; c < BLOCK; c += LANES) {
        Vec sum = load(c_ + c);
        for (int at = c; at < tile.n * BLOCK; at += BLOCK) {
          const VecI counts = load(pairs_.w.student + at) > splat(LEAST_WEIGHT);
          sum += select(counts, load(pairs_.w.teacher + at), Vec{});
        }
        store(c_ + c, sum);
      }
    }
    memcpy(above(h, first), c_, sizeof(float) * block_.n);
    memset(dphi_, 0, sizeof(float) * F * BLOCK);
    float r[BLOCK] = {};
    for (int64_t start = 0; start < first + block_.n; start += BLOCK) {
      KeyTile& tile = weigh(start, h);
      weight_gradients(tile, r);
      keep_linear(tile, h);
      gemm(F, BLOCK, (int)tile.n, rows(pairs_.tiles.phi(tile), BLOCK), pairs_.w.student, BLOCK,
           dphi_, BLOCK, Into::add, Skip::depth_keys, &pairs_.w.linear);
    }
    const FeatureMap map = p_.map_q(h);
    features_backward(map, block_.q, block_.phi, dphi_, nullptr, Into::set);
    features_backward_weight(map, block_.q, dphi_, partials_.q(worker_, h), scratch_);
    const float g = p_.g(h);
    for (int64_t i = 0; i < block_.n; i++)
      partials_.gate(worker_, h) += r[i] * (p_.affine ? 1.0f : 1.0f - g);
  }

  void keys_part(int64_t start, int64_t h0, int64_t h1) {
    const int F = (int)p_.F();
    memset(dphi_, 0, sizeof(float) * F * BLOCK);
    for (int64_t h = h0; h < h1; h++) {
      for (int64_t first = start; first < s_.tokens; first += BLOCK) {
        const int64_t last = at_most(first + BLOCK, s_.tokens) - 1;
        if (p_.window.start(last) <= start) continue;
        load_block(h, first);
        memcpy(c_, above(h, first), sizeof(float) * block_.n);
        const KeyTile& tile = weigh(start, h);
        weight_gradients(tile, nullptr);
        keep_linear(tile, h);
        memset(pairs_.w.student + tile.n * BLOCK, 0, sizeof(float) * (BLOCK - tile.n) * BLOCK);
        transpose(scratch_, BLOCK, pairs_.w.student, BLOCK, BLOCK, BLOCK);
        gemm(F, BLOCK, BLOCK, rows(block_.phi, BLOCK), scratch_, BLOCK, dphi_, BLOCK, Into::add,
             Skip::depth_queries_n, &pairs_.w.linear);
      }
    }
    KeyTile& tile = pairs_.tiles.at(start);
    const FeatureMap map = p_.map_k(state_head_);
    features_backward(map, tile.keys, pairs_.tiles.phi(tile), dphi_, nullptr, Into::set);
    features_backward_weight(map, tile.keys, dphi_, partials_.k(worker_), scratch_);
  }

  const lol_attention_transfer_args& a_;
  const Problem& p_;
  const Sequence& s_;
  const int64_t state_head_, worker_;
  const float factor_;
  const ParameterPartials& partials_;
  Pairs pairs_;
  Chunkwise queries_;
  Queries block_;
  float m_[BLOCK], den_[BLOCK], lse_[BLOCK], c_[BLOCK];
  float *dphi_, *scratch_, *above_;
};

}  // namespace

int attention_transfer(const lol_attention_transfer_args& a, const Batch& batch) {
  const Problem p = problem_of(a.student);
  const int64_t workers = batch.count * p.state_heads();
  Buffer sums(4 * workers);  // two doubles each, added up in order
  if (!sums.ok()) return LOL_ENOMEM;
  double* partial = (double*)sums.data;
  for (int64_t w = 0; w < 2 * workers; w++) partial[w] = 0.0;
  const auto prepare = [&] {
    if (!batch.padded) return;
    const int64_t rows = p.q.shape[0] * p.heads() * p.q.shape[2];
    clear_padding(batch, a.teacher, (float*)a.student.m.data, (float*)a.student.den.data);
    clear(a.residual);
    fill((float*)a.delta.data, rows, 0.0f);
    fill((float*)a.lse.data, rows, 0.0f);
  };
  const auto work = [&](int64_t w, Arena arena) {
    TransferWorker worker(a, p, batch.sequences[w / p.state_heads()], w % p.state_heads(), arena);
    worker.run(partial + 2 * w, partial + 2 * w + 1);
  };
  const int status = run_workers(workers, TransferWorker::floats(p), work, prepare);
  if (status != LOL_OK) return status;
  double squares = 0.0, entropy = 0.0;
  for (int64_t w = 0; w < workers; w++) {
    squares += partial[2 * w];
    entropy += partial[2 * w + 1];
  }
  const double queries = (double)at_least(batch.real_tokens * p.heads(), 1);
  *(float*)a.mse.data = (float)(squares / (queries * (double)p.V()));
  *(float*)a.xent.data = (float)(entropy / queries);
  return LOL_OK;
}

int attention_transfer_backward(const lol_attention_transfer_backward_args& a, const Batch& batch) {
  const lol_attention_transfer_args& fwd = a.forward;
  const Problem p = problem_of(fwd.student);
  const double queries = (double)at_least(batch.real_tokens * p.heads(), 1);
  BackwardProblem b(p);
  b.dy = fwd.residual;
  b.dy_factor = (float)(2.0 * *(const float*)a.d_mse.data / (queries * (double)p.V()));
  b.delta = (const float*)fwd.delta.data;
  b.m = (const float*)fwd.student.m.data;
  b.den = (const float*)fwd.student.den.data;
  b.dweight_q = a.dweight_q;
  b.dbias_q = a.dbias_q;
  b.dweight_k = a.dweight_k;
  b.dbias_k = a.dbias_k;
  b.dgate = (float*)a.dgate.data;
  const ParameterPartials partials(b.p, batch);
  int status = backward(b, batch, partials);
  if (status == LOL_OK && fwd.with_xent) {
    int64_t most = 0;
    for (int64_t i = 0; i < batch.count; i++) most = at_least(most, batch.sequences[i].tokens);
    const float factor = (float)(*(const float*)a.d_xent.data / queries);
    status = run_workers(partials.workers(), EntropyBackwardWorker::floats(p, most),
                         [&](int64_t w, Arena arena) {
                           for (int64_t i = partials.begin(w); i < partials.end(w); i++) {
                             Arena own = arena;
                             EntropyBackwardWorker(fwd, p, batch.sequences[i],
                                                   partials.state_head(w), factor, partials, w, own)
                                 .run();
                           }
                         });
  }
  if (status == LOL_OK) partials.reduce(b);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
