// Where a block of attention is, whatever its tiles: what it takes, and its rows of the statistics.
#pragma once
#include "attention_params.h"
#include "features.cuh"
#include "window.cuh"

namespace lol {
namespace cuda {

class AttentionBlock {
 protected:
  // What all threads know is in shared memory: registers are for the state.
  struct Place {
    int sequence, batch, head, kv_head, column;
    int length, first;  // of the sequence; its first token
    float log2_gate, lambda;
    const float *bias_q, *bias_k;
  };
  static_assert(sizeof(Place) <= kPlaceBytes, "");

  __device__ __forceinline__ AttentionBlock(const AttentionParams& params, unsigned char* shared)
      : p(params), at(*reinterpret_cast<Place*>(shared)) {}

  // A block takes `columns` of V.
  __device__ __forceinline__ void find_place(int columns, bool hybrid) {
    const int slices = (p.V + columns - 1) / columns, pair = blockIdx.x / slices;
    Place found = {};
    found.column = blockIdx.x % slices * columns;
    found.head = pair % p.H;
    found.kv_head = found.head / (p.H / p.Hk);
    found.sequence = pair / p.H;
    if (!p.cu_seqlens.data) {
      found.batch = found.sequence;
      found.length = p.T;
    } else if (p.sequences) {
      found.first = static_cast<int>(index_at(p.cu_seqlens, found.sequence));
      found.length = static_cast<int>(index_at(p.cu_seqlens, found.sequence + 1)) - found.first;
    }
    found.lambda = 1.f;
    if (hybrid) {
      const float g = p.gate[found.head];
      found.log2_gate = -log2f(1.f + exp2f(-kLog2e * g));
      if (p.affine) found.lambda = 1.f / (1.f + exp2f(kLog2e * g));
    }
    found.bias_q = bias_of(p.map_q, found.head);
    found.bias_k = bias_of(p.map_k, found.head);
    at = found;
  }
  __device__ __forceinline__ const float* bias_of(const Maps& maps, int head) const {
    return maps.bias ? maps.bias + head / maps.group * p.f : nullptr;
  }

  // Where the state of the sequence and head is, in rows of F = sides f.
  __device__ __forceinline__ int64 state_row(int sides) const {
    return (static_cast<int64>(at.sequence) * p.Hs + at.head / (p.H / p.Hs)) * sides * p.f;
  }
  // Where m and den of a token are.
  __device__ __forceinline__ int64 statistic(int position) const {
    return (static_cast<int64>(at.batch) * p.H + at.head) * p.T + at.first + position;
  }

  // Tokens after the last sequence belong to none: y = 0, m = 0, den = 1.
  template <class T, int columns>
  __device__ __forceinline__ void clear_rest(int threads) {
    for (int token = at.first + at.length + threadIdx.x; token < p.T; token += threads) {
      T* to = row_of<T>(p.o, at.batch, at.head, token) + at.column;
      for (int c = 0; c < min(columns, p.V - at.column); c++) to[c] = T{};
      const int64 own = statistic(token - at.first);
      if (at.column == 0 && p.m) p.m[own] = 0.f;
      if (at.column == 0) p.den[own] = 1.f;
    }
  }

  const AttentionParams& p;
  Place& at;
};

}  // namespace cuda
}  // namespace lol
