// The feature map (SPEC 1) of 16 rows by a warp: z in fragments of sums, features as left operands.
#pragma once
#include "features.cuh"
#include "tiles.cuh"

namespace lol {
namespace cuda {

// The weight of a map [D x f], as right operands. In shared memory, rounded and padded with zeros.
template <class T, int kD, int kf, bool kHeld>
struct Weight {
  using Number = T;
  static constexpr int kWidth = kf;
  Tile<T, kf> tile;

  // By all threads of a block.
  __device__ __forceinline__ void bring(const float* weight, int D, int f, int threads) {
    for (int i = threadIdx.x; i < kD * kf / 2; i += threads) {
      const int row = i / (kf / 2), pair = i % (kf / 2), c = 2 * pair;
      const float* w = weight + row * f + c;
      tile.pair(row, pair) =
          pack<T>(row < D && c < f ? w[0] : 0.f, row < D && c + 1 < f ? w[1] : 0.f);
    }
  }
};
// Where it is.
template <class T, int kD, int kf>
struct Weight<T, kD, kf, false> {
  using Number = T;
  static constexpr int kWidth = kf;
  const float* weight;
  int D, f;

  __device__ __forceinline__ void bring(const float* from, int rows, int columns, int) {
    *this = {from, rows, columns};
  }
  __device__ __forceinline__ float at(int row, int column) const {
    return row < D && column < f ? weight[row * f + column] : 0.f;
  }
};
template <class T, int kD, int kf>
__device__ __forceinline__ void load_right(int lane, Pair<T> (&b)[4],
                                           const Weight<T, kD, kf, true>& weight, int k, int n) {
  load_right(lane, b, weight.tile, k, n);
}
template <class T, int kD, int kf>
__device__ __forceinline__ void load_right(int lane, Pair<T> (&b)[4],
                                           const Weight<T, kD, kf, false>& weight, int k, int n) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = k + i % 2 * 8 + lane % 4 * 2, column = n + i / 2 * 8 + lane / 4;
    b[i] = pack<T>(weight.at(row, column), weight.at(row + 1, column));
  }
}

// A map as a warp sees it; without a weight the input is the feature.
template <class Weight>
struct TileMap {
  const Weight& weight;  // not there if !projects
  const float* bias;     // [f] or null
  bool projects;
  int f;
};

// The features of a warp's 16 rows, as left operands; in registers.
template <class T, int kF, bool kShared>
struct LeftFeatures {
  Pair<T> at[kF / 16][4];

  // The thread's columns of tile n of 8, in one of its two rows.
  __device__ __forceinline__ void set(int lane, int half, int n, Pair<T> pair) {
    at[n / 2][n % 2 * 2 + half] = pair;  // as pack_left does
  }
  __device__ __forceinline__ void load(int lane, Pair<T> (&a)[4], int f) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = at[f / 16][i];
  }
};
// In shared memory.
template <class T, int kF>
struct LeftFeatures<T, kF, true> {
  Tile<T, kF> tile;

  __device__ __forceinline__ void set(int lane, int half, int n, Pair<T> pair) {
    tile.pair(lane / 4 + 8 * half, 4 * n + lane % 4) = pair;
  }
  __device__ __forceinline__ void load(int lane, Pair<T> (&a)[4], int f) const {
    load_left(lane, a, tile, 0, f);
  }
};

constexpr unsigned kNegativeInfinity = 0xff800000u, kNaN = 0x7fffffffu;

// The columns of this thread in tile n of a fragment: this one and the next.
__device__ __forceinline__ int column_of(int lane, int n) { return 8 * n + lane % 4 * 2; }

__device__ __forceinline__ bool has_exponentials(const Activation& activation) {
  return activation.kind == kSoftmax || activation.kind == kExp;
}

// z = x W + b (+ x), of the first 16 rows of a tile; for favor less |x|^2 / 2. Columns from f on
// are 0, or NaN, which a maximum passes over.
template <class T, int kD, class Weight, int kTiles>
__device__ __forceinline__ void project(int lane, float (&z)[kTiles][4], const Tile<T, kD>& x,
                                        const TileMap<Weight>& map, const Activation& activation) {
  const float padding = __uint_as_float(has_exponentials(activation) ? kNaN : 0u);
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = column_of(lane, n) + e;
      z[n][e] = z[n][2 + e] = column >= map.f ? padding : map.bias ? map.bias[column] : 0.f;
    }
  }
  if (map.projects) {
    constexpr int kUnroll = kUnrollFor<T, 16 * kTiles>;
#pragma unroll kUnroll
    for (int k = 0; k < kD; k += 16) {
      Pair<T> a[4];
      load_left(lane, a, x, 0, k);
      multiply_row(lane, z, a, map.weight, k);
    }
  }
  if (!map.projects || activation.skip) {  // f == D
#pragma unroll
    for (int n = 0; n < (kTiles < kD / 8 ? kTiles : kD / 8); n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Pair<T> pair = x.pair(lane / 4 + 8 * half, column_of(lane, n) / 2);
        z[n][2 * half] += low<T>(pair);
        z[n][2 * half + 1] += high<T>(pair);
      }
    }
  }
  if (activation.kind == kFavor && map.projects) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float norm = 0.f;
      for (int i = lane % 4; i < kD / 2; i += 4) {
        const Pair<T> pair = x.pair(lane / 4 + 8 * half, i);
        norm += low<T>(pair) * low<T>(pair) + high<T>(pair) * high<T>(pair);
      }
      norm = 0.5f * quad_sum(norm);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
        z[n][2 * half] -= norm;
        z[n][2 * half + 1] -= norm;
      }
    }
  }
}

__device__ __forceinline__ float elementwise(int kind, float z, float favor_factor) {
  if (kind == kElu1) return z > 0.f ? z + 1.f : ptx::exp2_approx(kLog2e * z);
  if (kind == kRelu) return fmaxf(z, 0.f);
  if (kind == kFavor) return ptx::exp2_approx(kLog2e * z) * favor_factor;
  return z;
}

// factor * act(z), clamped, of the thread's row `half` and the side of that sign; finite from
// column f on; factor >= 0. Tile n by tile n to take(n, its two columns). One row at a time, which
// takes few registers; of many columns the exponentials are computed twice, once for their sum.
template <int kTiles, class Take>
__device__ __forceinline__ void activate(const float (&z)[kTiles][4], int half, float sign,
                                         const Activation& activation, int f, float factor,
                                         const Take& take) {
  constexpr bool kOnce = kTiles <= 8;
  const float least = factor * (activation.kind == kIdentity ? kLowest : activation.eps);
  const auto finish = [&](int n, float left, float right) {
    take(n, fmaxf(left, least), fmaxf(right, least));
  };
  if (!has_exponentials(activation)) {
    const float favor_factor = rsqrtf(static_cast<float>(f));
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      finish(n, factor * elementwise(activation.kind, z[n][2 * half], favor_factor),
             factor * elementwise(activation.kind, z[n][2 * half + 1], favor_factor));
    return;
  }
  float top = kLowest, sum = 0.f, y[kOnce ? kTiles : 1][2];
#pragma unroll
  for (int n = 0; n < kTiles; n++)
    top = fmaxf(top, fmaxf(sign * z[n][2 * half], sign * z[n][2 * half + 1]));
  top = quad_max(top) * kLog2e;
  const auto exponential = [&](int n, int e) {
    return fmaxf(ptx::exp2_approx(fmaf(sign * kLog2e, z[n][2 * half + e], -top)), 0.f);  // no NaN
  };
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) sum += y[kOnce ? n : 0][e] = exponential(n, e);
  }
  const float unit =
      factor * (activation.kind == kSoftmax ? ptx::reciprocal_approx(quad_sum(sum)) : 1.f);
  if (!kOnce) top = __int_as_float(ptx::opaque(__float_as_int(top)));  // or they would be kept
#pragma unroll
  for (int n = 0; n < kTiles; n++)
    finish(n, unit * (kOnce ? y[kOnce ? n : 0][0] : exponential(n, 0)),
           unit * (kOnce ? y[kOnce ? n : 0][1] : exponential(n, 1)));
}

}  // namespace cuda
}  // namespace lol
