// The feature map (SPEC 1) of a few rows at a time: phi(x) = clamp(act(x W + b (+ x)), eps).
#pragma once
#include "memory.cuh"

namespace lol {
namespace cuda {

// The codes of lol_activation.
enum Kind { kSoftmax, kExp, kElu1, kRelu, kIdentity, kFavor };

constexpr float kLog2e = 1.4426950408889634f;
// Gates count as this at least, and for lambda as its opposite at most, lest a query with one kind
// of keys alone divide zero by zero. -80 would do, but its 1 / den times a gradient overflows.
constexpr float kLeastGate = -60.f;
__device__ __forceinline__ float bounded_gate(float gate) {
  return gate < kLeastGate ? kLeastGate : gate;  // NaN stays NaN
}
__device__ __forceinline__ float affine_lambda(float gate) {
  return 1.f / (1.f + exp2f(-kLog2e * bounded_gate(-gate)));
}
constexpr float kLowest = -3.4e38f;  // below any score; not infinite, since inf - inf is no number

// Where rows are and what is made of them, in shared memory.
struct FeatureBuffers {
  float4* partial;  // [kRows x threads]
  float* x;         // [kRows x ld]
  float* z;         // [kRows x f]
};

// What belongs to row r, without an index into registers.
template <class X, int kRows>
__device__ __forceinline__ X of_row(const X (&x)[kRows], int r) {
  X found = x[0];
#pragma unroll
  for (int i = 1; i < kRows; i++) found = r == i ? x[i] : found;
  return found;
}

// Features are made in three stages, between which the threads meet: shares of z = x W + b, row r
// by map number map_of(r); their sums; and act. kThreads threads take up to kRows rows.
//
// A thread's share are four columns of every row, over a part of D. A weight that all rows share is
// read once, kInFlight loads at a time.
template <int kThreads, int kRows, int kInFlight, bool kWide, class MapOf>
__device__ __forceinline__ void project(int thread, const FeatureBuffers& at, const Maps& maps,
                                        const MapOf& map_of, bool shared, int rows,
                                        const MapShape& shape) {
  const int groups = kThreads >> shape.quad_shift;
  const int quad = thread & ((1 << shape.quad_shift) - 1);
  const int group = thread >> shape.quad_shift;
  float4 sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) sum[r] = zero4();
#pragma unroll 1
  for (int pass = 0; pass < (kRows == 1 || shared ? 1 : rows); pass++) {
    const float* weight = maps.weight + static_cast<int64>(map_of(pass)) * shape.D * shape.f;
#pragma unroll kInFlight
    for (int d = group; d < shape.D; d += groups) {
      const float4 w = load_quad<kWide>(weight + d * shape.f, quad, shape.f);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (kRows == 1 || (r < rows && (shared || r == pass)))
          sum[r] = fma4(at.x[r * shape.ld + d], w, sum[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (kRows == 1 || r < rows) at.partial[r * kThreads + thread] = sum[r];
  }
}
template <int kThreads, int kRows, class MapOf>
__device__ __forceinline__ void add_shares(int thread, const FeatureBuffers& at, const Maps& maps,
                                           const MapOf& map_of, int rows, const MapShape& shape,
                                           bool skip) {
  const int groups = kThreads >> shape.quad_shift;
  constexpr int share = kThreads / kRows;
  const int r = thread / share;
  if (r >= rows) return;
  const float* bias = maps.bias ? maps.bias + map_of(r) * shape.f : nullptr;
  const float* partial = reinterpret_cast<const float*>(at.partial + r * kThreads);
#pragma unroll 1
  for (int c = thread % share; c < shape.f; c += share) {
    float z = bias ? bias[c] : 0.f;
    if (skip) z += at.x[r * shape.ld + c];
#pragma unroll 4
    for (int g = 0; g < groups; g++) z += partial[4 * (g << shape.quad_shift) + c];
    at.z[r * shape.f + c] = z;
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

// A warp turns z[f] of one row into its features times `scale`, phi[i * kRows].
template <int kRows>
__device__ __forceinline__ void activate(const Activation& activation, const float* x, int D,
                                         const float* z, int f, float scale, float* phi) {
  const int lane = ptx::thread_of_block() % 32;
  if (activation.kind == kSoftmax || activation.kind == kExp) {
#pragma unroll 1
    for (int side = 0; side < (activation.two_sided ? 2 : 1); side++) {
      const float sign = side ? -kLog2e : kLog2e;
      float top = kLowest, sum = 0.f;
#pragma unroll 2  // f is 64 more often than not
      for (int i = lane; i < f; i += 32) top = fmaxf(top, sign * z[i]);
      top = warp_max(top);
#pragma unroll 2  // f is 64 more often than not
      for (int i = lane; i < f; i += 32) sum += exp2f(sign * z[i] - top);
      sum = warp_sum(sum);
      const float factor = activation.kind == kSoftmax ? 1.f / sum : 1.f;
#pragma unroll 2  // f is 64 more often than not
      for (int i = lane; i < f; i += 32)
        phi[(side * f + i) * kRows] =
            scale * fmaxf(exp2f(sign * z[i] - top) * factor, activation.eps);
    }
    return;
  }
  float half_norm = 0.f;
  if (activation.kind == kFavor) {
    for (int d = lane; d < D; d += 32) half_norm += 0.5f * x[d] * x[d];
    half_norm = warp_sum(half_norm);
  }
  const float favor_factor = rsqrtf(static_cast<float>(f));
#pragma unroll 2
  for (int i = lane; i < f; i += 32) {
    float y = z[i];
    if (activation.kind == kElu1) y = y > 0.f ? y + 1.f : exp2f(kLog2e * y);
    if (activation.kind == kFavor) y = exp2f(kLog2e * (y - half_norm)) * favor_factor;
    phi[i * kRows] = scale * (activation.kind == kIdentity ? y : fmaxf(y, activation.eps));
  }
}

// phi[F x kRows] of the rows of at.x; zeros for rows from `rows` on, unless there are none.
template <int kThreads, int kRows, class ScaleOf>
__device__ __forceinline__ void activate_rows(int thread, const FeatureBuffers& at,
                                              const Activation& activation, const ScaleOf& scale_of,
                                              int rows, const MapShape& shape, float* phi) {
  static_assert(kThreads >= 32 * kRows, "a warp for every row");
  const int r = thread / 32;
  if (r < rows) {
    activate<kRows>(activation, at.x + r * shape.ld, shape.D, at.z + r * shape.f, shape.f,
                    scale_of(r), phi + r);
  } else if (rows > 0 && r < kRows) {
    for (int i = thread % 32; i < shape.F; i += 32) phi[i * kRows + r] = 0.f;
  }
}

}  // namespace cuda
}  // namespace lol
