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

constexpr unsigned kNaN = 0x7fffffffu;

// The columns of this thread in tile n of a fragment: this one and the next.
__device__ __forceinline__ int column_of(int lane, int n) { return 8 * n + lane % 4 * 2; }

// Of a row, relative to its maximum.
__device__ __forceinline__ bool has_exponentials(const Activation& activation) {
  return activation.kind == kSoftmax || activation.kind == kExp;
}

template <int kTiles, class Function>
__device__ __forceinline__ void for_all(float (&z)[kTiles][4], const Function& function) {
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) z[n][e] = function(z[n][e]);
  }
}

// z = x W + b (+ x), of the first 16 rows of a tile; act(z), but for activations of whole rows.
// Columns from f on are finite, or NaN, which a maximum passes over.
template <class T, int kD, class Weight, int kTiles>
__device__ __forceinline__ void project(int lane, float (&z)[kTiles][4], const Tile<T, kD>& x,
                                        const TileMap<Weight>& map, const Activation& activation) {
  const float padding = __uint_as_float(has_exponentials(activation) ? kNaN : 0u);
  const int own = column_of(lane, 0), columns = map.f - own;  // 8 n + e is a column if it is less
  const float* bias = map.bias ? map.bias + own : nullptr;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int column = 8 * n + e;
      z[n][e] = z[n][2 + e] = column >= columns ? padding : bias ? bias[column] : 0.f;
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
  if (activation.kind == kElu1) {
    for_all(z, [](float x) { return x > 0.f ? x + 1.f : ptx::exp2_approx(kLog2e * x); });
  } else if (activation.kind == kRelu) {
    for_all(z, [](float x) { return fmaxf(x, 0.f); });
  } else if (activation.kind == kFavor) {
    float shift[2] = {0.f, 0.f};  // of each of the thread's rows
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float norm = 0.f;
      for (int i = lane % 4; i < kD / 2; i += 4) {
        const Pair<T> pair = x.pair(lane / 4 + 8 * half, i);
        norm += low<T>(pair) * low<T>(pair) + high<T>(pair) * high<T>(pair);
      }
      shift[half] = 0.5f * quad_sum(norm);
    }
    const float factor = rsqrtf(static_cast<float>(map.f));
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++)
        z[n][e] = ptx::exp2_approx(kLog2e * (z[n][e] - shift[e / 2])) * factor;
    }
  }
}

// Of what `project` left, factor * phi of the thread's row `half` and the side of that sign; finite
// from column f on; factor >= 0. Tile n by tile n to take(n, its two columns). One row at a time,
// which takes few registers; of many columns the exponentials are computed twice, once for their
// sum.
template <int kTiles, class Take>
__device__ __forceinline__ void activate(const float (&z)[kTiles][4], int half, float sign,
                                         const Activation& activation, float factor,
                                         const Take& take) {
  constexpr bool kOnce = kTiles <= 8;
  const float least = factor * (activation.kind == kIdentity ? kLowest : activation.eps);
  const auto finish = [&](int n, float left, float right) {
    take(n, fmaxf(left, least), fmaxf(right, least));
  };
  if (!has_exponentials(activation)) {
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      finish(n, factor * z[n][2 * half], factor * z[n][2 * half + 1]);
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
