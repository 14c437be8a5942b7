// The feature map (SPEC 1) of 16 rows by a warp: z in fragments of sums, features as left operands.
#pragma once
#include "features.cuh"
#include "tiles.cuh"

namespace lol {
namespace cuda {

// A map as a warp sees it; without a weight the input is the feature.
template <class T, int kf>
struct TileMap {
  Tile<T, kf> weight;  // [D x f], rounded; not there if !projects
  const float* bias;   // [f] or null
  bool projects;
  int f;
};

// The columns of this thread in tile n of a fragment: this one and the next.
__device__ __forceinline__ int column_of(int n) { return 8 * n + lane() % 4 * 2; }

// z = x W + b (+ x), of the first 16 rows of a tile; for favor less |x|^2 / 2.
template <class T, int kD, int kf>
__device__ __forceinline__ void project(float (&z)[kf / 8][4], const Tile<T, kD>& x,
                                        const TileMap<T, kf>& map, const Activation& activation) {
#pragma unroll
  for (int n = 0; n < kf / 8; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = column_of(n) + e;
      z[n][e] = z[n][2 + e] = map.bias && column < map.f ? map.bias[column] : 0.f;
    }
  }
  if (map.projects) {
#pragma unroll
    for (int k = 0; k < kD; k += 16) {
      unsigned a[4];
      load_left(a, x, 0, k);
      multiply_row(z, a, map.weight, k);
    }
  }
  if (!map.projects || activation.skip) {  // f == D
#pragma unroll
    for (int n = 0; n < (kf < kD ? kf : kD) / 8; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const unsigned pair = x.pair(lane() / 4 + 8 * half, column_of(n) / 2);
        z[n][2 * half] += low<T>(pair);
        z[n][2 * half + 1] += high<T>(pair);
      }
    }
  }
  if (activation.kind == kFavor && map.projects) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float norm = 0.f;
      for (int i = lane() % 4; i < kD / 2; i += 4) {
        const unsigned pair = x.pair(lane() / 4 + 8 * half, i);
        norm += low<T>(pair) * low<T>(pair) + high<T>(pair) * high<T>(pair);
      }
      norm = 0.5f * quad_sum(norm);
#pragma unroll
      for (int n = 0; n < kf / 8; n++) {
        z[n][2 * half] -= norm;
        z[n][2 * half + 1] -= norm;
      }
    }
  }
}

// exp(sign z - max), for softmax divided by its sum, of one row.
template <int kTiles>
__device__ __forceinline__ void exponential(float (&y)[kTiles][2], const float (&z)[kTiles][4],
                                            int half, float sign, int f, bool normalized) {
  float top = kLowest, sum = 0.f;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (column_of(n) + e < f) top = fmaxf(top, sign * z[n][2 * half + e]);
  }
  top = quad_max(top) * kLog2e;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float x = fmaf(sign * kLog2e, z[n][2 * half + e], -top);
      sum += y[n][e] = column_of(n) + e < f ? ptx::exp2_approx(x) : 0.f;
    }
  }
  const float factor = normalized ? 1.f / quad_sum(sum) : 1.f;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
    y[n][0] *= factor;
    y[n][1] *= factor;
  }
}

__device__ __forceinline__ float elementwise(int kind, float z, float favor_factor) {
  if (kind == kElu1) return z > 0.f ? z + 1.f : ptx::exp2_approx(kLog2e * z);
  if (kind == kRelu) return fmaxf(z, 0.f);
  if (kind == kFavor) return ptx::exp2_approx(kLog2e * z) * favor_factor;
  return z;
}

// y = factor * act(z), clamped, of the thread's row `half` and the side of that sign; 0 from column
// f on. One row at a time, which takes few registers.
template <int kTiles>
__device__ __forceinline__ void activate(float (&y)[kTiles][2], const float (&z)[kTiles][4],
                                         int half, float sign, const Activation& activation,
                                         bool mapped, int f, float factor) {
  const int kind = mapped ? activation.kind : kIdentity;
  if (kind == kSoftmax || kind == kExp) {
    exponential(y, z, half, sign, f, kind == kSoftmax);
  } else {
    const float favor_factor = rsqrtf(static_cast<float>(f));
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      y[n][0] = elementwise(kind, z[n][2 * half], favor_factor);
      y[n][1] = elementwise(kind, z[n][2 * half + 1], favor_factor);
    }
  }
  const float least = kind == kIdentity ? kLowest : activation.eps;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++)
      y[n][e] = column_of(n) + e < f ? fmaxf(y[n][e], least) * factor : 0.f;
  }
}

}  // namespace cuda
}  // namespace lol
