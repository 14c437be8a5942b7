// One attention call, as every op describes it to the shared algorithms.
#pragma once
#include "features.h"
#include "window.h"

namespace lol {
namespace LOL_ISA {

// Gates count as this at least, and for lambda as its opposite at most, lest a query with one kind
// of keys alone divide zero by zero. -80 would do for that, but its 1 / den times a gradient
// overflows.
constexpr float LEAST_GATE = -60.0f;

struct Problem {
  lol_tensor q, k, v;
  lol_features feature_q, feature_k;
  const float* gate;  // [H]; null in linear attention: no softmax part
  Window window;
  float scale;
  bool affine, normalize;
  float eps;                          // added to den
  Format format = Format::f32;        // of tiles
  WeightParts weight_parts = {1, 1};  // of maps
  bool both_ways = false;  // tiles have their keys as rows and can be summed over V as well

  // Products of bf16 by pairs, where the instruction set has them.
  Problem by_pairs() const {
    Problem p = *this;
    if (q.dtype == LOL_BF16 && takes_pairs(feature_k)) p.format = Format::bf16_pairs;
    p.weight_parts = weight_parts_for(feature_k.activation, false);
    return p;
  }

  int64_t heads() const { return q.shape[1]; }
  int64_t kv_heads() const { return k.shape[1]; }
  int64_t state_heads() const {
    return has_map(feature_k) ? feature_k.weight.shape[0] : kv_heads();
  }
  int64_t group() const { return heads() / state_heads(); }  // query heads per state
  int64_t kv_head_of(int64_t state_head) const { return state_head / (state_heads() / kv_heads()); }
  int64_t D() const { return q.shape[3]; }
  int64_t V() const { return v.shape[3]; }
  int64_t F() const { return out_features(feature_k, D()); }
  int64_t f() const { return has_map(feature_k) ? feature_k.weight.shape[2] : 0; }
  int64_t paired_map_size() const {
    return format == Format::f32 ? 0 : weight_parts.all * paired_weight_size(D(), f());
  }
  FeatureMap map_q(int64_t h) const { return map_of(feature_q, h, heads(), D()); }
  FeatureMap map_k(int64_t state_head) const {
    return map_of(feature_k, state_head, state_heads(), D());
  }
  // The map with its weight in the problem's format, in paired_map_size() floats.
  FeatureMap in_format(const FeatureMap& map, Arena& arena) const {
    if (format == Format::f32) return map;
    return with_paired_weight(map, arena.take(paired_map_size()), weight_parts);
  }
  // Where a sequence's entry has those of a query head in statistics [B, H, T].
  int64_t statistics_of(const Sequence& s, int64_t h) const {
    return (s.batch * heads() + h) * q.shape[2];
  }
  // Multiply-adds of the forward pass over all heads, for sharing it among threads.
  int64_t work(int64_t tokens) const {
    const int64_t span = 2 * (window.size + window.sink);
    const int64_t keys = gate ? at_most(span, tokens + span / 2) : 0;
    return heads() * tokens * (F() * (D() + 2 * V()) + keys * (D() + V()) / 2);
  }
  // At which products keep up with the rows of tokens that they ask for.
  Pace pace() const;
  // Weights of the softmax and of the linear part.
  float g(int64_t h) const {
    return gate ? sigmoid(gate[h] < LEAST_GATE ? LEAST_GATE : gate[h]) : 0.0f;
  }
  float lambda(int64_t h) const {
    if (!gate) return scale;
    return affine && window.any() ? sigmoid(-gate[h] < LEAST_GATE ? LEAST_GATE : -gate[h]) : 1.0f;
  }

 private:
  static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
};

Problem problem_of(const lol_hybrid_attention_args& args);
Problem problem_of(const lol_hybrid_attention_step_args& args);
Problem problem_of(const lol_linear_attention_args& args);

}  // namespace LOL_ISA
}  // namespace lol
