// What hybrid_attention and linear_attention are launched with, and how they are cut into blocks.
#pragma once
#include "params.h"

namespace lol {
namespace cuda {

constexpr int kAttentionShared = 163 * 1024;  // bytes that a block may have on an A100, and later
constexpr int kPlaceBytes = 128;              // of them for what all threads know
constexpr int kSinks = 16;                    // that are in shared memory at a time

// The tiles of an instance: the bytes of a number; D and f, padded; sides of the feature map;
// columns of V; tokens of a chunk, which are the queries that a block takes at a time and the keys
// of a tile; and how many of these tiles shared memory holds.
struct AttentionTiles {
  int number, D, f, sides, V, chunk, slots;

  constexpr int F() const { return sides * f; }
  // All share the state, the first ones have 16 queries each, the last ones as many keys' features.
  // More than for the queries where the state would leave no registers for the rest.
  constexpr int warps() const {
    return number * F() > 256 || state_registers(4) > kMostOfState ? 8 : 4;
  }
  constexpr int header_bytes() const { return kPlaceBytes + warps() * 16 * 4; }

  // What shared memory has to hold: q, phi_k, the state and ksum, tiles of keys and values; phi_q
  // if a thread would have too little left beside it, the state and the sums; sinks, unless giving
  // way makes room for the maps: then they come to the place of phi_k, anew for every chunk; maps,
  // if there is room, else they are read where they are.
  constexpr bool shares_queries() const {
    return state_registers(warps()) + 4 * (V / 8 + 1) + number * F() / 8 > kMostHeld;
  }
  constexpr bool holds_sinks() const {
    return bytes(true, true) <= kAttentionShared || bytes(false, true) > kAttentionShared;
  }
  constexpr bool holds_maps() const { return bytes(holds_sinks(), true) <= kAttentionShared; }
  constexpr int shared_bytes() const { return bytes(holds_sinks(), holds_maps()); }

 private:
  // Of a thread's 255 registers, what the compilers were seen to bear without spilling: the state
  // of D = 96 in four warps; state, sums and phi_q of D = 128.
  static constexpr int kMostOfState = 104, kMostHeld = 168;

  // ksum is one more tile of 8 columns.
  constexpr int state_registers(int warps) const { return F() / 16 / warps * (V / 8 + 1) * 4; }
  constexpr int bytes(bool sinks, bool maps) const {
    return header_bytes() + number * (chunk * D + chunk * F() * (shares_queries() ? 2 : 1) +
                                      F() * (V + 8) + (sinks ? kSinks * (D + V) : 0) +
                                      (maps ? 2 * D * f : 0) + slots * chunk * (D + V));
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

  int H, Hk, Hs, T, D, V, f, sides;
  int window, sink;
  bool terrace;
  bool wide;  // rows of q, k, v and o are and start at multiples of 16 bytes

  float *m, *den;            // [B, H, T]; m may be null
  const float *kv0, *ksum0;  // [N, Hs, F, V], [N, Hs, F], or null
  float *kv, *ksum;          // the same, or null
  Indices cu_seqlens;
  PaddingMask mask;
  int sequences;
  int segments;  // that a sequence is cut into
};

}  // namespace cuda
}  // namespace lol
