// The feature map on one tile, going backward.
#include "features.h"

namespace lol {
namespace LOL_ISA {
namespace {

// The gradient passes a clamp where the value was not raised; eps itself stands for a raised value.
inline Vec through_clamp(Vec dphi, Vec phi, float eps) {
  return select(phi > splat(eps), dphi, Vec{});
}

// One side of a map of exponentials, going backward. softmax: dz = p (dphi - dot). exp(z - max z):
// dz = p dphi, less dot at the maximum, shared by ties. `less` is dot, or each tie's share of it.
struct Side {
  const float *phi, *dphi;
  Vec less;
};
inline Side side_backward(const float* phi, const float* dphi, int f, bool normalize, float eps) {
  Vec dot = {}, ties = {};
  for (int i = 0; i < f; i++) {
    const Vec p = load(phi + i * BLOCK);
    dot += p * through_clamp(load(dphi + i * BLOCK), p, eps);
    ties += select(p == splat(1.0f), splat(1.0f), Vec{});
  }
  return {phi, dphi, normalize ? dot : dot / ties};
}
inline Vec dz_of(const Side& side, int i, bool normalize, float eps) {
  const Vec p = load(side.phi + i * BLOCK);
  const Vec d = through_clamp(load(side.dphi + i * BLOCK), p, eps);
  if (normalize) return p * (d - side.less);
  return p * d - select(p == splat(1.0f), side.less, Vec{});
}
// dz[f] of LANES tokens in the place of dphi; the upper side, of -z, counts against the lower one.
inline void exponentials_backward(const float* phi, float* dphi, int f, bool two_sided,
                                  bool normalize, float eps) {
  const Side lower = side_backward(phi, dphi, f, normalize, eps);
  if (!two_sided) {
    for (int i = 0; i < f; i++) store(dphi + i * BLOCK, dz_of(lower, i, normalize, eps));
    return;
  }
  const Side upper = side_backward(phi + f * BLOCK, dphi + f * BLOCK, f, normalize, eps);
  for (int i = 0; i < f; i++) {
    store(dphi + i * BLOCK, dz_of(lower, i, normalize, eps) - dz_of(upper, i, normalize, eps));
  }
}

// dz[f x BLOCK] of dphi in place; favor's gradient of -|x|^2 / 2, the sum of dz, into `norm`.
void activation_backward(const FeatureMap& map, const float* phi, float* dphi, float* norm) {
  const bool normalize = map.activation == LOL_SOFTMAX, favor = map.activation == LOL_FAVOR;
  for (int t = 0; t < BLOCK; t += LANES) {
    const float* p = phi + t;
    float* d = dphi + t;
    if (is_exponential(map.activation)) {
      exponentials_backward(p, d, map.f, map.two_sided, normalize, map.eps);
      continue;
    }
    Vec sum = {};
    for (int i = 0; i < map.f; i++) {
      const Vec y = load(p + i * BLOCK);
      Vec g = load(d + i * BLOCK);
      if (map.activation != LOL_IDENTITY) g = through_clamp(g, y, map.eps);
      if (map.activation == LOL_ELU1) g = g * min(y, splat(1.0f));
      if (favor) g = g * y;
      sum += g;
      store(d + i * BLOCK, g);
    }
    store(norm + t, sum);
  }
}

// A clamped probability still has a part in its side's sum of 1. Up to this floor it serves as its
// own value: what that adds to a gradient is less than fp32 rounds.
constexpr float NEGLIGIBLE_EPS = 1e-9f;

const float* probabilities(const FeatureMap& map, const MapBackward& at) {
  if (map.activation != LOL_SOFTMAX || map.eps <= NEGLIGIBLE_EPS) return at.phi;
  FeatureMap unclamped = map;
  unclamped.eps = 0.0f;
  features_forward(unclamped, at.x, at.scratch);
  return at.scratch;
}

}  // namespace

void transpose_weight(const FeatureMap& map, Format format, float* to) {
  if (!map.weight) return;
  const int ld = padded(map.D);
  memset(to, 0, sizeof(float) * (size_t)(map.f * ld));
  for (int d = 0; d < map.D; d++) {
    for (int j = 0; j < map.f; j++)
      to[j * ld + d] = map.weight[d * map.f + j] + (map.skip && d == j ? 1.0f : 0.0f);
  }
  if (format != Format::f32) pair_rows(to, to, map.f, ld);
}

void features_backward(const FeatureMap& map, const MapBackward& at, float* dphi) {
  const int ld = padded(map.D), n = (int)at.n;
  if (!map.weight) {
    if (!at.dx) return;
    to_rows(at.scratch, dphi, map.D);
    for (int i = 0; i < n * ld; i += LANES)
      store(at.dx + i, load(at.dx + i) + load(at.scratch + i));
    return;
  }
  float norm[BLOCK] = {};
  activation_backward(map, probabilities(map, at), dphi, norm);
  for (int i = 0; map.bias && i < map.f; i++) {
    Vec sum = {};
    for (int t = 0; t < BLOCK; t += LANES) sum += load(dphi + i * BLOCK + t);
    at.gradient.bias[i] += horizontal_sum(sum);
  }
  const bool pairs = map.format != Format::f32;
  if (pairs) pair_columns(at.scratch, dphi, map.f);
  gemm(map.format, map.f, ld, BLOCK, pairs ? rows(at.scratch, BLOCK / 2) : rows(dphi, BLOCK),
       at.x_rows, ld, at.gradient.weight, ld, Into::add);
  if (!at.dx) return;
  if (pairs) pair_rows(dphi, dphi, map.f, BLOCK);
  gemm(map.format, n, ld, map.f, transposed(dphi, BLOCK), at.weight_t, ld, at.dx, ld, Into::add);
  for (int i = 0; map.activation == LOL_FAVOR && i < n; i++) {
    for (int j = i * ld; j < (i + 1) * ld; j += LANES)
      store(at.dx + j, load(at.dx + j) - norm[i] * load(at.x_rows + j));
  }
}

void WeightGradient::reduce(const float* partials, int64_t groups, int64_t heads,
                            const lol_features& features, int64_t D, const lol_tensor& dweight,
                            const lol_tensor& dbias) {
  if (!has_map(features)) return;
  const int64_t maps = features.weight.shape[0], f = features.weight.shape[2],
                shared = heads / maps;
  float *dw = (float*)dweight.data, *db = (float*)dbias.data;
  memset(dw, 0, sizeof(float) * maps * D * f);
  if (db) memset(db, 0, sizeof(float) * maps * f);
  for (int64_t i = 0; i < groups * heads; i++) {
    const float* from = partials + i * floats(D, f);
    const int64_t map = i % heads / shared;
    for (int64_t d = 0; d < D; d++) {
      for (int64_t j = 0; j < f; j++) dw[(map * D + d) * f + j] += from[j * padded(D) + d];
    }
    for (int64_t j = 0; db && j < f; j++) db[map * f + j] += from[f * padded(D) + j];
  }
}

}  // namespace LOL_ISA
}  // namespace lol
