// The feature map on one tile (SPEC 1): phi(x) = clamp(act(x W + b (+ x)), eps), tokens along
// lanes. FLOPs per token: 2 D f forward, 4 D f backward (dx and dW). Backward takes features
// instead of z; where probabilities are clamped by more than rounding it computes them again.
#pragma once
#include "../arguments.h"
#include "pairs.h"

namespace lol {
namespace LOL_ISA {

constexpr int MAX_FEATURES = 512;
// The largest |z| that a softmax takes as it is: e^80 times MAX_FEATURES is a normal float, and so
// is its reciprocal.
constexpr float UNSHIFTED = 80.0f;
// With |z| up to SMALL, features of a softmax are LEAST_OF_SMALL or more: e^-20 / MAX_FEATURES.
constexpr float SMALL = 10.0f, LEAST_OF_SMALL = 4.0e-12f;

// A weight as parts of bf16, each what the ones before it left of 24 bits. One rounds z no worse
// than x was rounded, which is enough for outputs of tokens with small z of which little cancels
// (docs/precision.md): they are then off by 2.0e-3 to 3.1e-3, where SPEC 9 allows 3.3e-3. Other
// tokens take two; with one, softmax of N(0, 9) was off by 4.4e-3. Without a sum to divide by, exp
// was by 3.7e-3, and relu by 2.6e-2 with four features. Gradients take two, and three where they
// depend on which z is the largest, or above zero: there rounding can move a gradient to another
// feature as a whole.
struct WeightParts {
  int all;
  int always;  // the others from the first LANES tokens of a tile on for which these will not do
};
constexpr int MOST_WEIGHT_PARTS = 3;
// The largest |z| for which one will do in a softmax. Of N(0, 1.25) one in 12 million is beyond it,
// so that 16 tokens of 64 features hardly ever are; beyond 4 it is one in 3000.
constexpr float ONE_PART = 6.0f;
// What z is off by goes with the size it has where nothing cancels, the spread of x W for an x of
// this length in any direction: the largest for which one part will do beside features of size 1.
constexpr float ONE_PART_SPREAD = 2.5f;
static inline WeightParts weight_parts_for(int activation, bool of_gradients) {
  if (activation == LOL_EXP || activation == LOL_RELU) return {3, 3};
  if (of_gradients) return {2, 2};
  return {2, 1};
}

struct FeatureMap {
  const float* weight;  // [D x f] of one head, or pairs; null: phi(x) = x
  Format format;        // of weight and of x
  WeightParts parts;    // that add up to the weight
  const float* bias;    // [f] or null
  int D, f, F;
  int activation;
  bool two_sided, skip;
  float eps;
  float spread2 = 0.0f;  // with parts: that of x W for |x| = 1, squared, of the largest feature
};

static inline bool has_map(const lol_features& features) { return features.weight.data != nullptr; }

static inline bool is_exponential(int activation) {
  return activation == LOL_SOFTMAX || activation == LOL_EXP;
}

// The map that head h of `heads` uses.
static inline FeatureMap map_of(const lol_features& p, int64_t h, int64_t heads, int64_t D) {
  if (!has_map(p))
    return {nullptr, Format::f32,  {1, 1}, nullptr, (int)D, (int)D,
            (int)D,  LOL_IDENTITY, false,  false,   0.0f};
  const int64_t f = p.weight.shape[2];
  const int64_t own = h / (heads / p.weight.shape[0]);
  return {(const float*)p.weight.data + own * D * f,
          Format::f32,
          {1, 1},
          p.bias.data ? (const float*)p.bias.data + own * f : nullptr,
          (int)D,
          (int)f,
          (int)out_features(p, D),
          p.activation,
          p.two_sided != 0,
          p.skip != 0,
          (float)p.eps};
}

// What activations make of z, one entry at a time; favor's need |x|^2 / 2 for it.
static inline Vec activated(const FeatureMap& map, Vec z, Vec half_norm) {
  if (map.activation == LOL_IDENTITY) return z;
  Vec y = z;  // relu's: eps is no less than 0
  if (map.activation == LOL_ELU1) y = select(z > Vec{}, z + 1.0f, exp_below_one(min(z, Vec{})));
  if (map.activation == LOL_FAVOR) y = exp(z - half_norm) * (1.0f / sqrtf((float)map.f));
  return max(y, splat(map.eps));
}

// Whether features can be made of pairs of bf16, or are such pairs: favor needs x in fp32.
bool takes_pairs(const lol_features& features);
// The map with its weight in parts, pairs along D, one after the other in `to`.
FeatureMap with_paired_weight(FeatureMap map, float* to, WeightParts parts);
static inline int64_t paired_weight_size(int64_t D, int64_t f) { return (D + 1) / 2 * f; }

// phi[F x BLOCK] of x[D x BLOCK].
void features_forward(const FeatureMap& map, const float* x, float* phi);
// factor * phi in pairs of bf16; scratch [F x BLOCK], which may be where those along features go.
struct FeaturePairs {
  float* along_features;  // [ceil(F / 2) x BLOCK]
  float* along_tokens;    // [F x BLOCK / 2], or null
};
void features_in_pairs(const FeatureMap& map, const float* x, float factor, float* scratch,
                       FeaturePairs to);

// features_of_tokens.cpp: lanes along features, for tokens that are rows: of one, for the decode
// step,
void features_of_token(const FeatureMap& map, const float* x, float* phi);
// and of many, by a map.
struct TokenRows {
  int64_t n;
  const float* x;  // [n x D], rows x_stride apart
  int64_t x_stride;
  float* phi;  // [n x F]
  int64_t phi_stride;
  bool streamed;  // phi, if aligned, goes past the caches: end_of_stream() is left to the caller,
                  // since writes behind it wait for it
};
void features_of_tokens(const FeatureMap& map, const TokenRows& at, float* scratch);
// 6 x 4 or, with 16 registers, 6 x 2 sums, 4 or 2 vectors of weights and an x.
constexpr int TOKENS_AT_ONCE = 6;
static inline int64_t features_of_tokens_scratch(int64_t D, int64_t f) {
  return (3 * TOKENS_AT_ONCE + (f % LANES ? D : 0)) * padded(f);
}

// Groups of a batch's sequences: many of these have their gradients summed together, since sums of
// their own would take more memory than they do (D f floats per head). As many are enough for any
// CPU.
constexpr int64_t MOST_GROUPS = 64;
static inline int64_t groups_of(int64_t sequences, int64_t heads) {
  return at_most(sequences, at_least(MOST_GROUPS / at_least(heads, 1), 1));
}

// Partial gradients of one map's parameters, as one worker sums them.
struct WeightGradient {
  float *weight, *bias;  // [f x padded(D)], transposed; [f]
  static int64_t floats(int64_t D, int64_t f) { return f * padded(D) + padded(f); }
  static WeightGradient at(float* p, int64_t D, int64_t f) { return {p, p + f * padded(D)}; }
  // Adds partials [groups x heads] of the heads that share a map, in order, into dweight [Hf, D, f]
  // and dbias [Hf, f].
  static void reduce(const float* partials, int64_t groups, int64_t heads,
                     const lol_features& features, int64_t D, const lol_tensor& dweight,
                     const lol_tensor& dbias);
};

// The transposed weight, from which dx is computed: [f x padded(D)] or pairs along f, the identity
// added where the map has a skip. `map` holds its weight in fp32.
void transpose_weight(const FeatureMap& map, Format format, float* to);
static inline int64_t transposed_weight_size(int64_t D, int64_t f) { return (f + 1) * padded(D); }

// What the gradients of one tile of tokens are computed from and added to.
struct MapBackward {
  const float* x_rows;      // as load_values gives it in the map's format
  const float* x;           // [D x BLOCK] or pairs along D, as features_forward takes it
  const float* phi;         // [F x BLOCK], fp32
  const float* weight_t;    // transposed
  WeightGradient gradient;  // += x^T dz
  float* dx;                // [n x padded(D)] += dz W^T, or null
  int64_t n;
  float* scratch;  // scratch_size(D, f) floats
  static int64_t scratch_size(int64_t D, int64_t f) {
    return at_least(lanes_size(2 * f), rows_size(D));
  }
};
// Turns dphi[F x BLOCK] into dz[f x BLOCK] and spreads it; dphi is lost.
void features_backward(const FeatureMap& map, const MapBackward& at, float* dphi);

}  // namespace LOL_ISA
}  // namespace lol
