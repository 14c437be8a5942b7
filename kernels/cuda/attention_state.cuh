// The recurrent state of a block (SPEC 5), kV columns of it, in fp32 registers.
#pragma once
#include "attention_params.h"
#include "tiles.cuh"

namespace lol {
namespace cuda {

// A warp has every kWarps-th part of the rows of kv [F, V], in fragments of sums. ksum is one more
// column, the product with ones: the first of tile kSum.
template <class T, int kf, int kSides, int kV, int kWarps>
struct State {
  static constexpr int kF = kSides * kf, kTiles = kF / 16 / kWarps, kSum = kV / 8;
  static constexpr int kUnroll = kUnrollFor<T, kF>;
  float sums[kTiles][kSum + 1][4];

  static __device__ __forceinline__ int row_of_thread(int lane, int tile, int half) {
    return 16 * (kTiles * this_warp() + tile) + lane / 4 + 8 * half;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int n = 0; n <= kSum; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums[t][n][e] = 0.f;
      }
    }
  }

  // Loads or stores what the thread has of kv [.., V] and ksum, the sides x f rows from `first` on,
  // the first column being `column`. Columns at 0 have ksum.
  template <bool kLoad>
  __device__ __forceinline__ void move(float* kv, float* ksum, int64 first, int sides, int f, int V,
                                       int column) {
    const int lane = this_lane();
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int padded = row_of_thread(lane, t, half), feature = padded % kf;
        if (feature >= f || padded / kf >= sides) continue;
        const int64 row = first + padded / kf * f + feature;
#pragma unroll
        for (int n = 0; n < kSum; n++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int c = column + 8 * n + lane % 4 * 2 + e;
            if (c < V) move_one<kLoad>(sums[t][n][2 * half + e], kv + row * V + c);
          }
        }
        if (lane % 4 == 0 && (kLoad || column == 0))
          move_one<kLoad>(sums[t][kSum][2 * half], ksum + row);
      }
    }
  }
  template <bool kLoad>
  static __device__ __forceinline__ void move_one(float& mine, float* there) {
    if (kLoad) {
      mine = *there;
    } else {
      *there = mine;
    }
  }

  // Rounds the state for all warps to read; ksum in two columns, with what rounding lost in the
  // second.
  __device__ __forceinline__ void share(const Tile<T, kV>& kv, const Tile<T, 8>& ksum) const {
    const int lane = this_lane();
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = row_of_thread(lane, t, half);
#pragma unroll
        for (int n = 0; n < kSum; n++)
          kv.pair(row, 4 * n + lane % 4) = pack<T>(sums[t][n][2 * half], sums[t][n][2 * half + 1]);
        const float sum = sums[t][kSum][2 * half];
        ksum.pair(row, lane % 4) = pack<T>(sum, sum - to_float(from_float<T>(sum)));
      }
    }
  }

  // += phi_k^T values, of kKeys keys. Tensor cores do not round their sums to the nearest, which
  // would show in fp32 after many chunks: those are added by the ordinary units.
  template <int kKeys>
  __device__ __forceinline__ void absorb(const Tile<T, kF>& phi_k, const Tile<T, kV>& values) {
    if constexpr (sizeof(T) == 4) {
      State keys;
      keys.clear();
      keys.template add_products<kKeys>(phi_k, values);
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
#pragma unroll
        for (int n = 0; n <= kSum; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) sums[t][n][e] += keys.sums[t][n][e];
        }
      }
    } else {
      add_products<kKeys>(phi_k, values);
    }
  }

 private:
  template <int kKeys>
  __device__ __forceinline__ void add_products(const Tile<T, kF>& phi_k,
                                               const Tile<T, kV>& values) {
    const int lane = this_lane(), first = 16 * kTiles * this_warp();
#pragma unroll kUnroll
    for (int j = 0; j < kKeys; j += 16) {
      Pair<T> a[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; t++) load_left_transposed(lane, a[t], phi_k, first + 16 * t, j);
      for_columns<kV>(lane, values, j, 0, [&](int n, const Pair<T>(&b)[4]) {
#pragma unroll
        for (int t = 0; t < kTiles; t++) multiply<T>(sums[t][n], sums[t][n + 1], a[t], b);
      });
#pragma unroll
      for (int t = 0; t < kTiles; t++) multiply_ones<T>(lane, sums[t][kSum], a[t]);
    }
  }
};

}  // namespace cuda
}  // namespace lol
