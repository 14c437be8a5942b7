// The feature map on one tile (SPEC 1): phi(x) = clamp(act(x W + b (+ x)), eps), tokens along
// lanes. FLOPs per token: 2 D f forward, 4 D f backward (dx and dW). Backward needs x and phi
// alone, never z.
#pragma once
#include "tokens.h"

namespace lol {
namespace LOL_ISA {

struct FeatureMap {
  const float* weight;  // [D x f] of one head; null: phi(x) = x
  Format format;        // of weight and of x
  const float* bias;    // [f] or null
  int D, f, F;
  int activation;
  bool two_sided, skip;
  float eps;
};

static inline bool has_map(const lol_features& features) { return features.weight.data != nullptr; }

static inline int64_t feature_dim(const lol_features& features, int64_t D) {
  if (!has_map(features)) return D;
  return features.weight.shape[2] * (features.two_sided ? 2 : 1);
}

// The map that head h of `heads` uses.
static inline FeatureMap map_of(const lol_features& p, int64_t h, int64_t heads, int64_t D) {
  if (!has_map(p))
    return {nullptr, Format::f32,  nullptr, (int)D, (int)D,
            (int)D,  LOL_IDENTITY, false,   false,  0.0f};
  const int64_t f = p.weight.shape[2];
  const int64_t own = h / (heads / p.weight.shape[0]);
  return {(const float*)p.weight.data + own * D * f,
          Format::f32,
          p.bias.data ? (const float*)p.bias.data + own * f : nullptr,
          (int)D,
          (int)f,
          (int)feature_dim(p, D),
          p.activation,
          p.two_sided != 0,
          p.skip != 0,
          (float)p.eps};
}

// Whether a map can read pairs of bf16: skip and favor need x in fp32.
bool takes_pairs(const lol_features& features);
// The map with pairs of bf16 for weights, in `to` [ceil(D / 2) x f]: rounded no worse than x was.
FeatureMap with_paired_weight(FeatureMap map, float* to);

// phi[F x BLOCK] of x[D x BLOCK].
void features_forward(const FeatureMap& map, const float* x, float* phi);

// phi[F] of one token x[D], lanes along features: for the decode step.
void features_of_token(const FeatureMap& map, const float* x, float* phi);
constexpr int MAX_FEATURES = 512;

// Turns dphi[F x BLOCK] into dz[f x BLOCK] in place (in the first f rows), then sets or adds dx[D x
// BLOCK] unless it is null.
void features_backward(const FeatureMap& map, const float* x, const float* phi, float* dphi,
                       float* dx, Into into);

// Partial gradients of one map's parameters, as one worker sums them.
struct WeightGradient {
  float *weight, *bias;  // [D x padded(f)], [f]
  static int64_t floats(int64_t D, int64_t f) { return D * padded(f) + padded(f); }
  static WeightGradient at(float* p, int64_t D, int64_t f) { return {p, p + D * padded(f)}; }
  // Adds partials [groups x heads] of the heads that share a map, in order, into dweight [Hf, D, f]
  // and dbias [Hf, f].
  static void reduce(const float* partials, int64_t groups, int64_t heads,
                     const lol_features& features, int64_t D, const lol_tensor& dweight,
                     const lol_tensor& dbias);
};

// Adds x dz^T and the sum of dz; `scratch` holds rows_size(f) floats.
void features_backward_weight(const FeatureMap& map, const float* x, const float* dz,
                              const WeightGradient& gradient, float* scratch);

}  // namespace LOL_ISA
}  // namespace lol
