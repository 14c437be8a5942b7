#include "cross_entropy.h"

namespace lol {
namespace LOL_ISA {
namespace {

constexpr float LEAST_WEIGHT = 1e-12f;  // the logarithm's floor

// Copies a block's statistics out of [B, H, T]; `fallback` for the padding of a short block.
void load_statistics(const void* from, const Problem& p, const Sequence& s, int64_t h,
                     const Queries& block, float fallback, float* to) {
  const float* of_head = (const float*)from + p.statistics_of(s, h);
  for (int64_t i = 0; i < BLOCK; i++)
    to[i] = i < block.n ? of_head[s.row(block.first + i)] : fallback;
}

// Gradient of the cross-entropy. With a = u / den, u the unnormalised weight: d xent_i / d u_ij =
// (c_i - a*_ij / a_ij) / den_i, the second term where a_ij > 1e-12 only, and c_i the teacher's
// weight there. So lambda (phi_q . phi_k) and the gate get their gradients like those of mse, but
// for every pair.
class EntropyBackwardWorker {
 public:
  static int64_t floats(const Problem& p) {
    return AttentionWeights::floats(p) + Chunkwise::floats(p) + lanes_size(p.F()) +
           rows_size(p.D()) + scratch_size(p);
  }
  // `above` [B, H, T]: c of every query.
  EntropyBackwardWorker(const lol_attention_transfer_args& a, const Problem& p, const Sequence& s,
                        int64_t state_head, float factor, const ParameterPartials& partials,
                        int64_t slot, float* above, Arena arena)
      : a_(a),
        p_(p),
        s_(s),
        state_head_(state_head),
        slot_(slot),
        factor_(factor),
        partials_(partials),
        above_(above),
        weights_(p, state_head, s, arena),
        queries_(p, state_head, s.tokens, tokens_of(p.k, s, p.kv_head_of(state_head)),
                 tokens_of(p.v, s, p.kv_head_of(state_head)), arena) {
    dphi_ = arena.take(lanes_size(p.F()));
    x_rows_ = arena.take(rows_size(p.D()));
    scratch_ = arena.take(scratch_size(p));
  }

  void of_queries(const Segment& segment) {
    const int64_t h0 = state_head_ * p_.group(), h1 = h0 + p_.group();
    for (int64_t h = h0; h < h1; h++) {
      for (int64_t first = segment.begin; first < segment.end; first += BLOCK)
        queries_part(h, first);
    }
  }
  // Once of_queries() has been over all queries.
  void of_keys(const Segment& segment) {
    const int64_t h0 = state_head_ * p_.group(), h1 = h0 + p_.group();
    for (int64_t start = segment.begin; start < segment.end; start += BLOCK)
      keys_part(start, h0, h1);
  }

 private:
  static int64_t scratch_size(const Problem& p) {
    return at_least(MapBackward::scratch_size(p.D(), p.f()), BLOCK * BLOCK);
  }
  void load_block(int64_t h, int64_t first) {
    block_ =
        queries_.load_queries(h, first, at_most(BLOCK, s_.tokens - first), tokens_of(p_.q, s_, h));
    load_statistics(a_.student.m.data, p_, s_, h, block_, 0.0f, m_);
    load_statistics(a_.student.den.data, p_, s_, h, block_, 1.0f, den_);
    load_statistics(a_.lse.data, p_, s_, h, block_, 0.0f, lse_);
    memset(c_, 0, sizeof(c_));
  }
  KeyTile& weigh(int64_t start, int64_t h) {
    return weights_.weigh(start, block_, h, p_.lambda(h), m_, den_, lse_);
  }

  // Replaces the student's weights by factor * den * d xent / d u, and sums u times it over the
  // softmax keys into r.
  void weight_gradients(const KeyTile& tile, float* r) {
    for (int c = 0; c < BLOCK; c += LANES) {
      const Vec above = load(c_ + c);
      Vec sum = {};
      for (int j = 0; j < tile.n; j++) {
        const int at = j * BLOCK + c;
        const Vec a = load(weights_.w.student + at), teacher = load(weights_.w.teacher + at);
        const Vec ratio = select(a > splat(LEAST_WEIGHT), teacher / a, Vec{});
        const Vec d = select(in_band(weights_.w.causal, c, j), factor_ * (above - ratio), Vec{});
        sum += select(in_band(weights_.w.linear, c, j), Vec{}, a * d);
        store(weights_.w.student + at, d);
      }
      if (r) store(r + c, load(r + c) + sum);
    }
  }

  // The part of a tile's gradients that reaches the features: lambda / den over the linear keys.
  void keep_linear(const KeyTile& tile, int64_t h) {
    const float lambda = p_.lambda(h);
    for (int j = 0; j < tile.n; j++) {
      for (int c = 0; c < BLOCK; c += LANES) {
        float* d = weights_.w.student + j * BLOCK + c;
        store(d,
              select(in_band(weights_.w.linear, c, j), lambda * load(d) / load(den_ + c), Vec{}));
      }
    }
  }

  // dphi into the gradient of a map's parameters.
  void spread(const FeatureMap& map, const float* x, const float* phi, const WeightGradient& to) {
    to_rows(x_rows_, x, map.D);
    features_backward(map, {x_rows_, x, phi, nullptr, to, nullptr, 0, scratch_}, dphi_);
  }

  void queries_part(int64_t h, int64_t first) {
    load_block(h, first);
    const int F = (int)p_.F();
    for (int64_t start = 0; start < first + block_.n; start += BLOCK) {
      const KeyTile& tile = weigh(start, h);
      for (int c = 0; c < BLOCK; c += LANES) {
        Vec sum = load(c_ + c);
        for (int at = c; at < tile.n * BLOCK; at += BLOCK) {
          const VecI counts = load(weights_.w.student + at) > splat(LEAST_WEIGHT);
          sum += select(counts, load(weights_.w.teacher + at), Vec{});
        }
        store(c_ + c, sum);
      }
    }
    float* above = above_ + p_.statistics_of(s_, h);
    for (int64_t i = 0; i < block_.n; i++) above[s_.row(first + i)] = c_[i];
    memset(dphi_, 0, sizeof(float) * F * BLOCK);
    float r[BLOCK] = {};
    for (int64_t start = 0; start < first + block_.n; start += BLOCK) {
      KeyTile& tile = weigh(start, h);
      weight_gradients(tile, r);
      keep_linear(tile, h);
      gemm(F, BLOCK, (int)tile.n, rows(weights_.tiles.phi(tile), BLOCK), weights_.w.student, BLOCK,
           dphi_, BLOCK, Into::add, Skip::depth_of_column, &weights_.w.linear);
    }
    spread(p_.map_q(h), block_.q, block_.phi, partials_.q(slot_, h));
    const float g = p_.g(h);
    for (int64_t i = 0; i < block_.n; i++)
      partials_.gate(slot_, h) += r[i] * (p_.affine ? 1.0f : 1.0f - g);
  }

  void keys_part(int64_t start, int64_t h0, int64_t h1) {
    const int F = (int)p_.F();
    memset(dphi_, 0, sizeof(float) * F * BLOCK);
    for (int64_t h = h0; h < h1; h++) {
      for (int64_t first = start; first < s_.tokens; first += BLOCK) {
        const int64_t last = at_most(first + BLOCK, s_.tokens) - 1;
        if (p_.window.start(last) <= start) continue;
        load_block(h, first);
        load_statistics(above_, p_, s_, h, block_, 0.0f, c_);
        const KeyTile& tile = weigh(start, h);
        weight_gradients(tile, nullptr);
        keep_linear(tile, h);
        memset(weights_.w.student + tile.n * BLOCK, 0, sizeof(float) * (BLOCK - tile.n) * BLOCK);
        to_lanes(scratch_, weights_.w.student, BLOCK);
        const Band queries = of_rows(weights_.w.linear);
        gemm(F, BLOCK, BLOCK, rows(block_.phi, BLOCK), scratch_, BLOCK, dphi_, BLOCK, Into::add,
             Skip::depth_of_column, &queries);
      }
    }
    KeyTile& tile = weights_.tiles.at(start);
    spread(p_.map_k(state_head_), tile.keys, weights_.tiles.phi(tile),
           partials_.k(slot_, state_head_));
  }

  const lol_attention_transfer_args& a_;
  const Problem& p_;
  const Sequence& s_;
  const int64_t state_head_, slot_;
  const float factor_;
  const ParameterPartials& partials_;
  float* const above_;
  AttentionWeights weights_;
  Chunkwise queries_;
  Queries block_;
  float m_[BLOCK], den_[BLOCK], lse_[BLOCK], c_[BLOCK];
  float *dphi_, *x_rows_, *scratch_;
};

}  // namespace

double cross_entropy(AttentionWeights& weights, const Queries& block, int64_t h, const float* m,
                     const float* den, const float* lse) {
  float sum[BLOCK] = {};
  for (int64_t start = 0; start < block.first + block.n; start += BLOCK) {
    const KeyTile& tile = weights.weigh(start, block, h, 1.0f, m, den, lse);
    for (int c = 0; c < BLOCK; c += LANES) {
      Vec total = load(sum + c);
      for (int at = c; at < tile.n * BLOCK; at += BLOCK) {
        total -= load(weights.w.teacher + at) *
                 log(max(load(weights.w.student + at), splat(LEAST_WEIGHT)));
      }
      store(sum + c, total);
    }
  }
  double result = 0.0;
  for (int64_t i = 0; i < block.n; i++) result += sum[i];
  return result;
}

int cross_entropy_backward(const lol_attention_transfer_args& a, const Problem& p,
                           const Batch& batch, const Segments& segments, float factor,
                           const ParameterPartials& partials) {
  const int64_t Hs = p.state_heads(), slots = partials.slots();
  const int threads = thread_count(slots * Hs, 3 * p.work(batch.real_tokens));
  const Buffer above(p.q.shape[0] * p.heads() * p.q.shape[2]);
  const Arenas arenas(threads, EntropyBackwardWorker::floats(p));
  if (!above.ok() || !arenas.ok()) return LOL_ENOMEM;
  const auto each_segment = [&](const auto& work) {
    run_workers(arenas, threads, slots * Hs, [&](int64_t w, Arena arena) {
      const int64_t slot = w / Hs;
      partials.each_segment(slot, batch, segments, [&](const Sequence& s, int64_t j) {
        EntropyBackwardWorker worker(a, p, s, w % Hs, factor, partials, slot, above.data, arena);
        work(worker, segments.at(s, j));
      });
    });
  };
  each_segment([](EntropyBackwardWorker& worker, const Segment& g) { worker.of_queries(g); });
  each_segment([](EntropyBackwardWorker& worker, const Segment& g) { worker.of_keys(g); });
  return LOL_OK;
}

}  // namespace LOL_ISA
}  // namespace lol
