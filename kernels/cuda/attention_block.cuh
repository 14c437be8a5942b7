// Where a block of attention is, whatever its tiles: what it takes, and its rows of the statistics.
#pragma once
#include "attention_params.h"
#include "features.cuh"
#include "tiles.cuh"
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
    bool holes;      // between its tokens, of padding
    int begin, end;  // chunks that the block attends
    bool last;       // of the sequence's blocks
    bool stores;     // the final state
  };
  static_assert(sizeof(Place) <= kPlaceBytes, "");

  __device__ __forceinline__ AttentionBlock(const AttentionParams& params, unsigned char* shared)
      : p(params),
        at(*reinterpret_cast<Place*>(shared)),
        list(reinterpret_cast<int*>(shared + kPlaceBytes) + 16 * this_warp()) {}

  // A block takes `columns` of V and a segment of the chunks. By one warp.
  __device__ __forceinline__ void find_place(int columns, int chunk, bool hybrid) {
    const int slices = (p.V + columns - 1) / columns, segment = blockIdx.x % p.segments;
    const int pair = blockIdx.x / p.segments / slices;
    Place found = {};
    found.column = blockIdx.x / p.segments % slices * columns;
    found.head = pair % p.H;
    found.kv_head = found.head / (p.H / p.Hk);
    found.sequence = pair / p.H;
    if (!p.cu_seqlens.data) {
      found.batch = found.sequence;
      found.length = p.T;
      if (p.mask.real) find_real_tokens(found);
    } else if (p.sequences) {
      found.first = static_cast<int>(index_at(p.cu_seqlens, found.sequence));
      found.length = static_cast<int>(index_at(p.cu_seqlens, found.sequence + 1)) - found.first;
    }
    const int chunks = (found.length + chunk - 1) / chunk;
    found.begin = segment_start(segment, chunks);
    found.end = segment_start(segment + 1, chunks);
    found.last = segment + 1 == p.segments;
    // Query heads that share a state have the same one.
    found.stores = p.kv && found.last && found.head % (p.H / p.Hs) == 0;
    found.lambda = 1.f;
    if (hybrid) {
      const float g = p.gate[found.head];
      found.log2_gate = -log2f(1.f + exp2f(-kLog2e * bounded_gate(g)));
      if (p.affine) found.lambda = affine_lambda(g);
    }
    found.bias_q = bias_of(p.map_q, found.head);
    found.bias_k = bias_of(p.map_k, found.head);
    if (this_lane() == 0) at = found;
  }
  __device__ __forceinline__ const float* bias_of(const Maps& maps, int head) const {
    return maps.bias ? maps.bias + head / maps.group * p.f : nullptr;
  }

  // Where the state of the sequence and head is, in rows.
  __device__ __forceinline__ int64 state_row() const {
    return (static_cast<int64>(at.sequence) * p.Hs + at.head / (p.H / p.Hs)) * p.sides * p.f;
  }
  // Where m and den of a token are.
  __device__ __forceinline__ int64 statistic(int token) const {
    return (static_cast<int64>(at.batch) * p.H + at.head) * p.T + token;
  }

  // Positions count real tokens. The tokens at 16 positions from `first` on, for one warp; those
  // of the call before are forgotten. Where padding leaves holes, it counts.
  __device__ __forceinline__ Tokens tokens_at(int first) const {
    if (!at.holes) return {nullptr, at.first + first};
    __syncwarp();
    int position = -first;
    for (int token = at.first + this_lane(); position < 16 && token - this_lane() < p.T;
         token += 32) {
      const bool real = token < p.T && real_tokens(at.batch)[token];
      const unsigned ballot = __ballot_sync(~0u, real);
      const int own = position + __popc(ballot & ((1u << this_lane()) - 1));
      if (real && own >= 0 && own < 16) list[own] = token;
      position += __popc(ballot);
    }
    __syncwarp();
    return {list, 0};
  }

  // Tokens of padding and after the last sequence belong to none: y = 0, m = 0, den = 1.
  template <class T, int columns>
  __device__ __forceinline__ void clear_rest(int threads) {
    const int end = p.mask.real ? 0 : at.first + at.length;
    for (int token = end + threadIdx.x; token < p.T; token += threads) {
      if (p.mask.real && real_tokens(at.batch)[token]) continue;
      T* to = row_of<T>(p.o, at.batch, at.head, token) + at.column;
      for (int c = 0; c < min(columns, p.V - at.column); c++) to[c] = T{};
      const int64 own = statistic(token);
      if (at.column == 0 && p.m) p.m[own] = 0.f;
      if (at.column == 0) p.den[own] = 1.f;
    }
  }

  const AttentionParams& p;
  Place& at;

 private:
  __device__ __forceinline__ const bool* real_tokens(int batch) const {
    return p.mask.real + batch * p.mask.batch;
  }
  // A block first takes the keys before its segment into the state, at about 0.3 of the cost of
  // attending them: to be done together, a segment is 1 / sqrt(2) of the one before.
  __device__ __forceinline__ int segment_start(int segment, int chunks) const {
    if (segment == p.segments) return chunks;
    const float share = (1.f - exp2f(-0.5f * segment)) / (1.f - exp2f(-0.5f * p.segments));
    return static_cast<int>(chunks * share);
  }
  __device__ __forceinline__ void find_real_tokens(Place& found) const {
    const bool* real = real_tokens(found.batch);
    int count = 0, first = p.T, end = 0;
#pragma unroll 8
    for (int token = this_lane(); token < p.T; token += 32) {
      if (!real[token]) continue;
      count++;
      first = at_most(first, token);
      end = token + 1;
    }
#pragma unroll
    for (int by = 16; by; by /= 2) {
      count += __shfl_xor_sync(~0u, count, by);
      first = at_most(first, __shfl_xor_sync(~0u, first, by));
      end = at_least(end, __shfl_xor_sync(~0u, end, by));
    }
    found.length = count;
    found.first = first;
    found.holes = count > 0 && end - first > count;
  }

  int* list;  // of the warp's tokens
};

}  // namespace cuda
}  // namespace lol
