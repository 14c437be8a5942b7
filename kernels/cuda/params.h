// What the CUDA kernels are launched with: plain data, filled by the host (plan.cpp) and read by
// the device. No header is included, because NVRTC has none.
#pragma once

namespace lol {
namespace cuda {

using int64 = long long;

// Rows of which a block of feature_map makes features at a time, and queries that a decoding block
// takes at a time, if there are several.
constexpr int kRows = 4;
// Tokens of a block of feature_map, and its threads.
constexpr int kStrip = 32, kFeatureMapThreads = 256;
// Threads of a decoding block, in groups of `lanes`.
constexpr int step_threads(int lanes, int queries) { return (queries == 1 ? 8 : 16) * lanes; }

// A sequence tensor [B, H, T, width]: strides in elements, the last dimension contiguous.
struct Rows {
  void* data;
  int64 batch, head, token;
};

// The maps of feature_q or feature_k; `group` consecutive heads share one.
struct Maps {
  const float* weight;  // [Hf, D, f]
  const float* bias;    // [Hf, f] or null
  int group;
};

// What the two maps of an attention agree in.
struct Activation {
  int kind;  // lol_activation
  bool two_sided, skip;
  float eps;
};

// The shape of a map, D x f to F features.
struct MapShape {
  int D, f, F;
  int ld;          // numbers from one row of x to the next
  int quad_shift;  // so many threads, a power of two, hold the columns of a row four by four
};

// Offsets [N + 1], or slots [N]: int32 or int64 as the caller has them; null if absent.
struct Indices {
  const void* data;
  bool wide;
};

// What a decoding block notes of its sequence and of a query, at most.
constexpr int kSequenceBytes = 128, kQueryBytes = 64;

// Where a block keeps what in shared memory: offsets in bytes.
struct FeatureMapShared {
  int partial, x, z, phi;
};
struct StepShared {
  int sequence, queries, partial, q, x, z, phi_q, phi_k, leaving, ksum, pairs, scores, k, v;
};

struct FeatureMapParams {
  Rows x, y;
  Maps maps;
  MapShape map;
  Activation activation;
  int H, T;
  FeatureMapShared shared;
};

struct StepParams {
  Rows q, k, v, o;
  Maps map_q, map_k;
  Activation activation;
  const float* gate;  // [H]
  float scale;
  bool affine;

  MapShape map;
  int H, Hk, Hs, T, V;

  int window, sink;
  bool terrace;
  int ring;
  int slack;  // tokens that can be taken back after the call
  int keys;   // of a tile in shared memory
  int k_row;  // bytes from one key of a tile to the next
  StepShared shared;

  int slots;              // P
  float *kv, *ksum;       // [P, Hs, F, V], [P, Hs, F]
  void *k_ring, *v_ring;  // [P, Hk, ring, D|V]
  void *k_sink, *v_sink;  // [P, Hk, sink, D|V]
  int* length;            // [P] int64, as two words each
  int64* folded;          // [P]
  Indices state_indices, cu_seqlens;
  int sequences;
};

}  // namespace cuda
}  // namespace lol
