// The feature map (SPEC 1) of 16 rows by a warp: z in fragments of sums, features as left operands.
#pragma once
#include "features.cuh"
#include "tiles.cuh"

namespace lol {
namespace cuda {

// Of a row, relative to its maximum.
__device__ __forceinline__ bool has_exponentials(const Activation& activation) {
  return activation.kind == kSoftmax || activation.kind == kExp;
}

// Whether bf16 is projected in fp16, which holds weights of three more bits: what z is off by is a
// relative error of its exponential. Of x, larger numbers than 65504 end there, and below 2^-14 a
// multiple of 2^-24 is taken, which no exponential shows; other activations of z keep its range.
template <class T>
__device__ __forceinline__ bool projects_in_f16(const Activation& activation) {
  return kSame<T, bf16> && has_exponentials(activation);
}

// The weight of a map [D x f]. In shared memory, rounded and padded with zeros.
template <class T, int kD, int kf, bool kHeld>
struct Weight {
  static constexpr int kWidth = kf;
  Tile<T, kf> tile;

  // By all threads of a block.
  __device__ __forceinline__ void bring(const float* weight, int D, int f, int threads,
                                        bool in_f16) {
    for (int i = threadIdx.x; i < kD * kf / 2; i += threads) {
      const int row = i / (kf / 2), pair = i % (kf / 2), c = 2 * pair;
      const float* w = weight + row * f + c;
      const float left = row < D && c < f ? w[0] : 0.f;
      const float right = row < D && c + 1 < f ? w[1] : 0.f;
      tile.pair(row, pair) = pack<T>(left, right);
      if constexpr (kSame<T, bf16>) {
        if (in_f16) tile.pair(row, pair) = pack<f16>(left, right);
      }
    }
  }
};
// Where it is.
template <class T, int kD, int kf>
struct Weight<T, kD, kf, false> {
  static constexpr int kWidth = kf;
  const float* weight;
  int D, f;

  __device__ __forceinline__ void bring(const float* from, int rows, int columns, int, bool) {
    *this = {from, rows, columns};
  }
  __device__ __forceinline__ float at(int row, int column) const {
    return row < D && column < f ? weight[row * f + column] : 0.f;
  }
};
// The weight as right operands of products in N.
template <class N, class Weight>
struct RightWeight {
  using Number = N;
  const Weight& weight;
};
template <class N, class T, int kD, int kf>
__device__ __forceinline__ void load_right(int lane, Pair<N> (&b)[4],
                                           const RightWeight<N, Weight<T, kD, kf, true>>& right,
                                           int k, int n) {
  load_right(lane, b, right.weight.tile, k, n);
}
template <class N, class T, int kD, int kf>
__device__ __forceinline__ void load_right(int lane, Pair<N> (&b)[4],
                                           const RightWeight<N, Weight<T, kD, kf, false>>& right,
                                           int k, int n) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = k + i % 2 * 8 + lane % 4 * 2, column = n + i / 2 * 8 + lane / 4;
    b[i] = pack<N>(right.weight.at(row, column), right.weight.at(row + 1, column));
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
  static constexpr bool kInRegisters = true;
  Pair<T> fragments[kF / 16][4];

  // The thread's columns of tile n of 8, in one of its two rows.
  __device__ __forceinline__ Pair<T>& at(int lane, int half, int n) {
    return fragments[n / 2][n % 2 * 2 + half];  // as pack_left does
  }
  __device__ __forceinline__ void load(int lane, Pair<T> (&a)[4], int f) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = fragments[f / 16][i];
  }
};
// In shared memory.
template <class T, int kF>
struct LeftFeatures<T, kF, true> {
  static constexpr bool kInRegisters = false;
  Tile<T, kF> tile;
  int first;  // of the rows

  __device__ __forceinline__ Pair<T>& at(int lane, int half, int n) {
    return tile.pair(first + lane / 4 + 8 * half, 4 * n + lane % 4);
  }
  __device__ __forceinline__ void load(int lane, Pair<T> (&a)[4], int f) const {
    load_left(lane, a, tile, first, f);
  }
};

// Two fp32 sums in the bytes of two pairs of 16-bit numbers, or of one pair of fp32.
template <class T>
__device__ __forceinline__ void put_sums(Pair<T>& here, Pair<T>& there, const float* sums) {
  if constexpr (sizeof(T) == 4) {
    here = make_float2(sums[0], sums[1]);
  } else {
    here = __float_as_uint(sums[0]);
    there = __float_as_uint(sums[1]);
  }
}
template <class T>
__device__ __forceinline__ void get_sums(float* sums, const Pair<T>& here, const Pair<T>& there) {
  if constexpr (sizeof(T) == 4) {
    sums[0] = here.x;
    sums[1] = here.y;
  } else {
    sums[0] = __uint_as_float(here);
    sums[1] = __uint_as_float(there);
  }
}

constexpr unsigned kNaN = 0x7fffffffu;

// The columns of this thread in tile n of a fragment: this one and the next.
__device__ __forceinline__ int column_of(int lane, int n) { return 8 * n + lane % 4 * 2; }

template <int kTiles, class Function>
__device__ __forceinline__ void for_all(float (&z)[kTiles][4], const Function& function) {
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) z[n][e] = function(z[n][e]);
  }
}

// Two numbers of bf16 as the nearest of fp16.
__device__ __forceinline__ unsigned f16_of_bf16(unsigned pair) {
  constexpr unsigned kMost = 0x477f477fu;  // 65280, twice: the largest below 65504
  pair = ptx::max_bf16x2(ptx::min_bf16x2(pair, kMost), kMost | 0x80008000u);
  return pack<f16>(low<bf16>(pair), high<bf16>(pair));
}

// z += x W, products in N.
template <class N, class T, int kD, class Weight, int kTiles>
__device__ __forceinline__ void add_projection(int lane, float (&z)[kTiles][4],
                                               const Tile<T, kD>& x, const Weight& weight,
                                               int first) {
  const RightWeight<N, Weight> right = {weight};
  constexpr int kMost = kUnrollFor<T, 2 * Weight::kWidth>;
  // With two kinds of products, eight at a time would leave too few registers.
  constexpr int kUnroll = kD > 96 && kMost > 4 ? 4 : kMost;
#pragma unroll kUnroll
  for (int k = 0; k < kD; k += 16) {
    Pair<T> a[4];
    load_left(lane, a, x, 0, k);
    if constexpr (!kSame<N, T>) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = f16_of_bf16(a[i]);
    }
    multiply_row<8 * kTiles>(lane, z, a, right, k, first);
  }
}

// z = x W + b (+ x), of the first 16 rows of a tile and the columns from `first` on; act(z), but
// for activations of whole rows. Columns from f on are finite, or NaN, which a maximum passes over.
template <class T, int kD, class Weight, int kTiles>
__device__ __forceinline__ void project(int lane, float (&z)[kTiles][4], const Tile<T, kD>& x,
                                        const TileMap<Weight>& map, const Activation& activation,
                                        int first) {
  const float padding = __uint_as_float(has_exponentials(activation) ? kNaN : 0u);
  const int own = first + column_of(lane, 0);
  const int columns = map.f - own;  // 8 n + e is a column if it is less
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
    if constexpr (kSame<T, bf16>) {
      if (projects_in_f16<T>(activation)) {
        add_projection<f16>(lane, z, x, map.weight, first);
      } else {
        add_projection<T>(lane, z, x, map.weight, first);
      }
    } else {
      add_projection<T>(lane, z, x, map.weight, first);
    }
  }
  if (!map.projects || activation.skip) {  // f == D
#pragma unroll
    for (int n = 0; n < (kTiles < kD / 8 ? kTiles : kD / 8); n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Pair<T> pair = x.pair(lane / 4 + 8 * half, (first + column_of(lane, n)) / 2);
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

// The exponentials of a thread's row on one side of its map, relative to the largest.
struct Exponentials {
  float sign;           // of the side
  float top = kLowest;  // the largest, in powers of 2
  float sum = 0.f;      // of the thread's columns

  __device__ __forceinline__ float of(float z) const {
    return fmaxf(ptx::exp2_approx(fmaf(sign * kLog2e, z, -top)), 0.f);  // no NaN
  }
  // Columns of the thread's row `half`; their exponentials to keep(tile, column, it).
  template <int kTiles, class Keep>
  __device__ __forceinline__ void add(const float (&z)[kTiles][4], int half, const Keep& keep) {
    const float before = top;
    float most = kLowest;
#pragma unroll
    for (int n = 0; n < kTiles; n++)
      most = fmaxf(most, fmaxf(sign * z[n][2 * half], sign * z[n][2 * half + 1]));
    top = fmaxf(before, quad_max(most) * kLog2e);
    if (before != kLowest) sum *= ptx::exp2_approx(before - top);
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float y = of(z[n][2 * half + e]);
        sum += y;
        keep(n, e, y);
      }
    }
  }
};

// The features of the first 16 rows of x, times factor(side, half) for the thread's two rows, which
// is not negative. They are finite past the map's columns, and zero from `columns` on. Where they
// are in shared memory, z of many columns waits, in fp32, in the place of the thread's features of
// both sides.
template <int kf, int kSides, class T, int kD, class Features, class Weight, class Factor>
__device__ __forceinline__ void make_features(int lane, Features& features, const Tile<T, kD>& x,
                                              const TileMap<Weight>& map,
                                              const Activation& activation, int columns,
                                              const Factor& factor) {
  constexpr bool kWaits = !Features::kInRegisters && kSides == 2 && kf > 64;
  constexpr int kBlock = kWaits ? 64 : kf, kTiles = kBlock / 8;
  constexpr int kSidesAtOnce = Features::kInRegisters ? kSides : kUnrollFor<T, kSides * kf>;
  float z[kTiles][4];
  // Columns from `first` on: y(tile, column) in units of `unit`.
  const auto finish = [&](int first, int side, int half, float unit, const auto& y) {
    const float scale = factor(side, half);
    const float least = scale * (activation.kind == kIdentity ? kLowest : activation.eps);
    const int own = columns - column_of(lane, 0);  // 8 n + e is a column if it is less
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      const int tile = first / 8 + n;
      const float left = fmaxf(scale * unit * y(n, 0), least);
      const float right = fmaxf(scale * unit * y(n, 1), least);
      features.at(lane, half, side * kf / 8 + tile) =
          pack<T>(8 * tile < own ? left : 0.f, 8 * tile + 1 < own ? right : 0.f);
    }
  };
  const auto unit_of = [&](const Exponentials& row) {
    return activation.kind == kSoftmax ? ptx::reciprocal_approx(quad_sum(row.sum)) : 1.f;
  };
  const auto finish_z = [&](int first, int side, int half, const Exponentials& row) {
    if (has_exponentials(activation)) {
      finish(first, side, half, unit_of(row),
             [&](int n, int e) { return row.of(z[n][2 * half + e]); });
    } else {
      finish(first, side, half, 1.f, [&](int n, int e) { return z[n][2 * half + e]; });
    }
  };
  const auto forget = [](int, int, float) {};
  if constexpr (!kWaits) {
    project(lane, z, x, map, activation, 0);
#pragma unroll kSidesAtOnce
    for (int side = 0; side < kSides; side++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        Exponentials row = {side ? -1.f : 1.f};
        if (kTiles <= 8 && has_exponentials(activation)) {
          float kept[kTiles][2];
          row.add(z, half, [&](int n, int e, float y) { kept[n][e] = y; });
          finish(0, side, half, unit_of(row), [&](int n, int e) { return kept[n][e]; });
        } else {
          if (has_exponentials(activation)) row.add(z, half, forget);
          // Or the compiler would keep the exponentials, in as many registers as z has.
          row.top = __int_as_float(ptx::opaque(__float_as_int(row.top)));
          finish_z(0, side, half, row);
        }
      }
    }
  } else {
    static_assert(kf <= kD, "x is read at the columns of z");
    Exponentials rows[2][2] = {{{1.f}, {1.f}}, {{-1.f}, {-1.f}}};
#pragma unroll 1
    for (int first = 0; first < kf; first += kBlock) {
      project(lane, z, x, map, activation, first);
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int side = 0; side < 2; side++)
          if (has_exponentials(activation)) rows[side][half].add(z, half, forget);
#pragma unroll
        for (int n = 0; n < kTiles; n++)
          put_sums<T>(features.at(lane, half, first / 8 + n),
                      features.at(lane, half, (kf + first) / 8 + n), &z[n][2 * half]);
      }
    }
#pragma unroll 1
    for (int first = 0; first < kf; first += kBlock) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int n = 0; n < kTiles; n++)
          get_sums<T>(&z[n][2 * half], features.at(lane, half, first / 8 + n),
                      features.at(lane, half, (kf + first) / 8 + n));
#pragma unroll
        for (int side = 0; side < 2; side++) finish_z(first, side, half, rows[side][half]);
      }
    }
  }
}

}  // namespace cuda
}  // namespace lol
