// What hybrid_attention and linear_attention are launched with, and how they are cut into blocks.
#pragma once
#include "params.h"

namespace lol {
namespace cuda {

constexpr int kChunk = 64;          // tokens that a block takes at a time; keys of a tile
constexpr int kSinks = 16;          // of them in shared memory at a time
constexpr int kSlots = 3;           // tiles of keys in shared memory: two at work, one on its way
constexpr int kAttentionWarps = 4;  // of 16 queries each
constexpr int kPlaceBytes = 128;    // of shared memory, for what all threads know
constexpr int kHeaderBytes = kPlaceBytes + 4 * 16 * kAttentionWarps;

// The tiles of an instance: D and f, padded; sides of the feature map; columns of V.
struct AttentionTiles {
  int D, f, sides, V;

  // Numbers of two bytes: q, k and v, sinks, phi_k, the state and ksum, the weights.
  constexpr int shared_bytes() const {
    return kHeaderBytes + 2 * (kChunk * D + kSlots * kChunk * (D + V) + kSinks * (D + V) +
                               kChunk * sides * f + sides * f * (V + 8) + 2 * D * f);
  }
};

// Which tokens are real, [B, T]; null if all are.
struct PaddingMask {
  const bool* real;
  int64 batch;  // from one row to the next
};

struct AttentionParams {
  Rows q, k, v, o;
  Maps map_q, map_k;  // without weights, q and k are the features
  Activation activation;
  const float* gate;  // [H]; null for linear attention
  float scale, eps;   // eps is added to den
  bool affine, normalize;

  int H, Hk, Hs, T, D, V, f;
  int window, sink;
  bool terrace;
  bool wide;  // rows of q, k, v and o are and start at multiples of 16 bytes

  float *m, *den;            // [B, H, T]; m may be null
  const float *kv0, *ksum0;  // [N, Hs, F, V], [N, Hs, F], or null
  float *kv, *ksum;          // the same, or null
  Indices cu_seqlens;
  PaddingMask mask;
  int sequences;
};

}  // namespace cuda
}  // namespace lol
