// Attention forward (SPEC 3, 4) by tensor cores, in one pass over the tokens.
//
//   y_i = (g sum_W e^(s_ij - m_i) v_j + lam phi_q (kv + sum_N phi_j v_j)) / (the same with v = 1)
//
// A block takes a sequence, a query head and kV columns of the values, and walks chunks of 64
// queries; a warp has 16 of them. The state of the keys before the oldest tile that a chunk weighs
// pair by pair stays in registers, divided among the warps by its rows, and is handed round in
// shared memory, rounded, before the chunk adds its oldest tiles to it.
//
// Tiles of keys are walked from the newest to the oldest, sinks first: a query meets all its
// softmax keys before its first linear one, so that the running maximum is final when the linear
// part, which must not be rescaled, joins the same sums. Both kinds of weights of a tile share one
// product with the values. The denominator is one more column of the sums, over values of 1: it
// sums what the numerator does, rounded weights, and a query with one key gets its value. ksum is
// that column of the state.
#pragma once
#include "attention_block.cuh"
#include "attention_state.cuh"
#include "tile_features.cuh"

namespace lol {
namespace cuda {

constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kNegativeInfinity = 0xff800000u;

template <class T>
constexpr bool kHoldsSums = true;
template <>
constexpr bool kHoldsSums<f16> = false;  // its largest number is 65504

template <class T, int kD, int kf, int kSides, int kV, bool kHybrid>
class Attention : AttentionBlock {
 public:
  static constexpr int kThreads = 32 * kAttentionWarps, kF = kSides * kf;
  static constexpr AttentionTiles kTiles = {kD, kf, kSides, kV};
  static_assert(kV <= kD, "outputs pass through the tile of queries");

  __device__ __forceinline__ Attention(const AttentionParams& params, unsigned char* shared)
      : AttentionBlock(params, shared) {
    T* free = reinterpret_cast<T*>(shared + kHeaderBytes);
    q = take<kChunk, kD>(free);
    k = take<kSlots * kChunk, kD>(free);
    v = take<kSlots * kChunk, kV>(free);
    k_sink = take<kSinks, kD>(free);
    v_sink = take<kSinks, kV>(free);
    phi_k = take<kChunk, kF>(free);
    kv = take<kF, kV>(free);
    ksum = take<kF, 8>(free);
    weight_q = take<kD, kf>(free);
    weight_k = take<kD, kf>(free);
  }

  __device__ __forceinline__ void run() {
    if (warp() == 0) find_place(kV, kHybrid);
    __syncthreads();
    const int chunks = (at.length + kChunk - 1) / kChunk;
    load_weights(weight_q, p.map_q);
    load_weights(weight_k, p.map_k);
    load_state();
    if (chunks) {
      load_queries(0);
      load_tile(0);
      load_sinks(0);
    }
    for (int chunk = 0; chunk < chunks; chunk++) attend(chunk);
    store_state();
    if (p.mask.real || at.sequence + 1 >= p.sequences) clear_rest<T, kV>(kThreads);
  }

 private:
  static constexpr int kSum = kV / 8;  // the tile of sums whose first column is that of the ones

  template <int rows, int columns>
  static __device__ __forceinline__ Tile<T, columns> take(T*& free) {
    const Tile<T, columns> tile = {free};
    free += rows * columns;
    return tile;
  }
  __device__ __forceinline__ TileMap<T, kf> map_of(const Maps& maps, const Tile<T, kf>& weight,
                                                   const float* bias) const {
    return {weight, bias, maps.weight != nullptr, p.f};
  }
  // The queries of this warp, of which nobody else knows.
  __device__ __forceinline__ Tile<T, kD> own_queries() const { return q.rows(16 * warp()); }
  __device__ __forceinline__ int first_query(int chunk) const {
    return ptx::opaque(chunk) * kChunk + 16 * warp();
  }
  __device__ __forceinline__ int own_row(int half) const {
    return 16 * warp() + lane() / 4 + 8 * half;
  }
  __device__ __forceinline__ Tile<T, kD> keys(int tile) const {
    return k.rows(tile % kSlots * kChunk);
  }
  __device__ __forceinline__ Tile<T, kV> values(int tile) const {
    return v.rows(tile % kSlots * kChunk);
  }
  // The oldest tile of keys that a chunk weighs pair by pair. Computed anew wherever it is needed,
  // as are the next two, so that nothing waits in registers.
  __device__ __forceinline__ int first_tile(int chunk) const {
    chunk = ptx::opaque(chunk);
    return p.window == 0 ? chunk : window_start(p, chunk * kChunk) / kChunk;
  }

  // ---- Loads

  __device__ __forceinline__ void load_weights(const Tile<T, kf>& to, const Maps& maps) {
    if (!maps.weight) return;
    const float* weight = maps.weight + static_cast<int64>(at.head / maps.group) * p.D * p.f;
    for (int i = threadIdx.x; i < kD * kf / 2; i += kThreads) {
      const int row = i / (kf / 2), pair = i % (kf / 2), c = 2 * pair;
      const float* w = weight + row * p.f + c;
      to.pair(row, pair) =
          pack<T>(row < p.D && c < p.f ? w[0] : 0.f, row < p.D && c + 1 < p.f ? w[1] : 0.f);
    }
  }
  __device__ __forceinline__ void load_queries(int chunk) {
    const int position = chunk * kChunk + 16 * warp();
    copy_rows(own_queries(), row_of<T>(p.q, at.batch, at.head, 0), p.q.token, tokens_at(position),
              at.length - position, p.D, p.wide);
    ptx::cp_async_commit();
  }
  // A warp brings 16 of the kKeys keys from a position on.
  template <int kKeys>
  __device__ __forceinline__ void load_keys(const Tile<T, kD>& to_k, const Tile<T, kV>& to_v,
                                            int position) {
    const int first = 16 * warp(), count = at.length - position - first;
    if (first < kKeys) {
      const Tokens tokens = tokens_at(position + first);
      copy_rows(to_k.rows(first), row_of<T>(p.k, at.batch, at.kv_head, 0), p.k.token, tokens, count,
                p.D, p.wide);
      copy_rows(to_v.rows(first), row_of<T>(p.v, at.batch, at.kv_head, 0) + at.column, p.v.token,
                tokens, count, p.V - at.column, p.wide);
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_tile(int tile) {
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++)
      held[slot] = tile % kSlots == slot ? tile : held[slot];
    load_keys<kChunk>(keys(tile), values(tile), tile * kChunk);
  }
  __device__ __forceinline__ void load_sinks(int first) {
    if (kHybrid && p.sink) load_keys<kSinks>(k_sink, v_sink, first);
  }
  __device__ __forceinline__ bool holds(int tile) const {
    bool found = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++) found |= held[slot] == tile;
    return found;
  }
  // Waits for a tile of keys, and for all threads to be done with the one before; starts with the
  // next one, where it has a slot of its own.
  __device__ __forceinline__ void visit(int tile, int next) {
    if (!holds(tile)) {
      __syncthreads();
      load_tile(tile);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (next * kChunk < at.length && !holds(next) && next % kSlots != tile % kSlots)
      load_tile(next);
  }

  // ---- A chunk

  __device__ __forceinline__ void attend(int chunk) {
    float unit = 1.f;  // of the sums
#pragma unroll 1
    for (int tile = chunk; tile >= first_tile(chunk); tile--) {
      visit(tile, tile > first_tile(chunk) ? tile - 1 : chunk + 1);
      if (tile == chunk) {
        begin_queries();
        if (has_state(chunk)) unit = share_state(first_tile(chunk));
        if (kHybrid) attend_sinks(chunk);
      }
      const bool leaves = absorbs(chunk, tile);
      if (leaves || tile * kChunk < last_start(chunk)) {
        make_key_features(tile);
        __syncthreads();
      }
      attend_keys<kChunk, false>(keys(tile), values(tile), chunk, tile * kChunk);
      if (leaves) state.absorb(phi_k, values(tile));
    }
    if (has_state(chunk)) {
      __syncthreads();
      read_state(unit);
    }
    store_outputs(chunk, unit);
    if ((chunk + 1) * kChunk < at.length) load_queries(chunk + 1);
  }
  // Few sinks stay where they are.
  __device__ __forceinline__ void attend_sinks(int chunk) {
#pragma unroll 1
    for (int first = 0; first < p.sink && first < (chunk + 1) * kChunk; first += kSinks) {
      if (p.sink > kSinks) {
        __syncthreads();
        load_sinks(first);
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      attend_keys<kSinks, true>(k_sink, v_sink, chunk, first);
    }
  }
  // The start of the window of a chunk's last query.
  __device__ __forceinline__ int last_start(int chunk) const {
    return window_start(p, ptx::opaque(chunk) * kChunk + kChunk - 1);
  }
  __device__ __forceinline__ bool has_state(int chunk) const {
    return first_tile(chunk) > 0 || p.kv0;
  }
  // Whether the state of the next chunk has the tile.
  __device__ __forceinline__ bool absorbs(int chunk, int tile) const {
    const int next = chunk + 1;
    return tile < first_tile(next) && (p.kv || next * kChunk < at.length);
  }

  __device__ __forceinline__ void begin_queries() {
#pragma unroll
    for (int n = 0; n <= kSum; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] = 0.f;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) m[half] = __uint_as_float(kNegativeInfinity);
    float z[kf / 8][4], y[kf / 8][2];
    project(z, own_queries(), map_of(p.map_q, weight_q, at.bias_q), p.activation);
#pragma unroll
    for (int side = 0; side < kSides; side++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        activate(y, z, half, side ? -1.f : 1.f, p.activation, p.map_q.weight, p.f, at.lambda);
#pragma unroll
        for (int n = 0; n < kf / 8; n++)  // as pack_left does
          phi_q[(side * kf / 8 + n) / 2][n % 2 * 2 + half] = pack<T>(y[n][0], y[n][1]);
      }
    }
  }

  // phi_k of a tile; zero for keys that do not exist and for sinks, which the state does not take.
  __device__ __forceinline__ void make_key_features(int tile) {
    float z[kf / 8][4], y[kf / 8][2];
    project(z, keys(tile).rows(16 * warp()), map_of(p.map_k, weight_k, at.bias_k), p.activation);
#pragma unroll
    for (int side = 0; side < kSides; side++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int j = tile * kChunk + own_row(half);
        const float factor = j < at.length && j >= p.sink ? 1.f : 0.f;
        activate(y, z, half, side ? -1.f : 1.f, p.activation, p.map_k.weight, p.f, factor);
#pragma unroll
        for (int n = 0; n < kf / 8; n++)
          phi_k.pair(own_row(half), side * kf / 2 + 4 * n + lane() % 4) = pack<T>(y[n][0], y[n][1]);
      }
    }
  }

  // Adds keys to the sums of the warp's queries: those of a tile that starts at j, or the sinks.
  // Groups of 16 keys that no query of the warp attends are passed over.
  template <int kKeys, bool kAreSinks>
  __device__ __forceinline__ void attend_keys(const Tile<T, kD>& keys, const Tile<T, kV>& values,
                                              int chunk, int j) {
    constexpr int groups = kKeys / 16;
    const int i = first_query(chunk);
    const int first_start = window_start(p, i), last_start = window_start(p, i + 15);
    const int row = i + lane() / 4;  // of the thread's
    const int start[2] = {window_start(p, row), window_start(p, row + 8)};
    bool near[groups], far[groups], any_near = false;
#pragma unroll
    for (int g = 0; g < groups; g++) {
      const int key = j + 16 * g;
      near[g] = kHybrid && key <= i + 15 && (kAreSinks || key + 15 >= first_start);
      far[g] = !kAreSinks && key < last_start;
      any_near |= near[g];
    }
    float s[2 * groups][4] = {};
    if (kHybrid && any_near) {
#pragma unroll
      for (int d = 0; d < kD; d += 16) {
        unsigned a[4];
        load_left(a, own_queries(), 0, d);
#pragma unroll
        for (int g = 0; g < groups; g++) {
          if (!near[g]) continue;
          unsigned b[4];
          load_right_transposed(b, keys, d, 16 * g);
          multiply<T>(s[2 * g], s[2 * g + 1], a, b);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++)
        weigh<kAreSinks>(s, half, row + 8 * half, start[half], j);
    }
#pragma unroll
    for (int g = 0; g < groups; g++) {
      if (far[g]) add_linear_weights(s[2 * g], s[2 * g + 1], start, j, 16 * g);
      if (near[g] || far[g]) {
        unsigned a[4];
        pack_left<T>(a, s[2 * g], s[2 * g + 1]);
        multiply_row_and_ones(acc, a, values, 16 * g);
        // Without the denominator, which has the same error, rounding a weight would show in y.
        if (!kHybrid && !p.normalize) {
          subtract_rounded<T>(s[2 * g], s[2 * g + 1], a);
          pack_left<T>(a, s[2 * g], s[2 * g + 1]);
          multiply_row_and_ones(acc, a, values, 16 * g);
        }
      }
    }
  }

  // Turns scores of one of the thread's rows into softmax weights, 0 outside of the window.
  template <bool kAreSinks, int kTiles>
  __device__ __forceinline__ void weigh(float (&s)[kTiles][4], int half, int row, int start,
                                        int j) {
    const float unit = p.scale * kLog2e, before = m[half];
    float top = before;
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int key = j + column_of(n) + e;
        const bool inside = kAreSinks ? key < p.sink : key >= start && key >= p.sink;
        float& x = s[n][2 * half + e];
        x = inside && key <= row ? x * unit : __uint_as_float(kNegativeInfinity);
        top = fmaxf(top, x);
      }
    }
    top = quad_max(top);
    m[half] = top;
    top = fmaxf(top, kLowest);  // so that nothing is not subtracted from nothing
    const float rescale = ptx::exp2_approx(before - top), shift = at.log2_gate - top;
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = s[n][2 * half + e];
        x = ptx::exp2_approx(x + shift);
      }
    }
#pragma unroll
    for (int n = 0; n <= kSum; n++) {
      acc[n][2 * half] *= rescale;
      acc[n][2 * half + 1] *= rescale;
    }
  }

  // w += phi_q phi_k of the keys that have left the window, 16 of them from j + key on.
  __device__ __forceinline__ void add_linear_weights(float (&left)[4], float (&right)[4],
                                                     const int (&start)[2], int j, int key) {
    float w[2][4] = {};
#pragma unroll
    for (int f = 0; f < kF; f += 16) {
      unsigned b[4];
      load_right_transposed(b, phi_k, f, key);
      multiply<T>(w[0], w[1], phi_q[f / 16], b);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int own = j + key + column_of(0) + e % 2, end = start[e / 2];
      left[e] += own < end && own >= p.sink ? w[0][e] : 0.f;
      right[e] += own + 8 < end && own + 8 >= p.sink ? w[1][e] : 0.f;
    }
  }

  // ---- The state

  __device__ __forceinline__ void load_state() {
    state.clear();
    bound = 1.f;
    if (!p.kv0) return;
    state.template move<true>(const_cast<float*>(p.kv0), const_cast<float*>(p.ksum0),
                              state_row(kSides), p.f, p.V, at.column);
    for (int i = 0; i < kSides * p.f; i++) bound = fmaxf(bound, p.ksum0[state_row(kSides) + i]);
  }
  __device__ __forceinline__ void store_state() {
    // Query heads that share a state have the same one.
    if (p.kv && at.head % (p.H / p.Hs) == 0)
      state.template move<false>(p.kv, p.ksum, state_row(kSides), p.f, p.V, at.column);
  }
  // Rounds the state for all warps to read; in which units. fp16 does not hold sums, but their
  // means. Its features are at most 1 (plan_attention.cpp), and so ksum at most the number of keys.
  __device__ __forceinline__ float share_state(int oldest) {
    const float unit = kHoldsSums<T> ? 1.f : 1.f / (bound + oldest * kChunk);
    state.share(kv, ksum, unit);
    return unit;
  }
  // Adds what the queries read from the state.
  __device__ __forceinline__ void read_state(float unit) {
    if (!kHoldsSums<T>) {
#pragma unroll
      for (int n = 0; n <= kSum; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] *= unit;
      }
    }
#pragma unroll
    for (int f = 0; f < kF; f += 16) {
      multiply_row(acc, phi_q[f / 16], kv, f);
      unsigned b[2];
      ptx::ldmatrix_trans(b, ksum.at(f + lane() % 16, 0));
      mma_m16n8k16<T>(acc[kSum], phi_q[f / 16], b);
    }
  }

  // ---- Results

  // Of the warp's queries; the sums are in units of 1 / unit. The rows of y are put together where
  // the queries were.
  __device__ __forceinline__ void store_outputs(int chunk, float unit) {
    const int i = first_query(chunk);
    const Tokens tokens = tokens_at(i);
    const Tile<T, kV> y = {own_queries().data};
    const float factor = (kHybrid ? 1.f : p.scale) / unit;
    __syncwarp();  // all lanes are done with the queries
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float den = acc[kSum][2 * half] + acc[kSum][2 * half + 1];  // the state's is in both columns
      den = p.eps + factor * __shfl_sync(~0u, den, lane() & ~3);
      if (!p.normalize) den = 1.f;
      const float scale = factor / den;
#pragma unroll
      for (int n = 0; n < kSum; n++)
        y.pair(lane() / 4 + 8 * half, column_of(n) / 2) =
            pack<T>(scale * acc[n][2 * half], scale * acc[n][2 * half + 1]);
      const int row = lane() / 4 + 8 * half;
      if (at.column == 0 && lane() % 4 == 0 && i + row < at.length) {
        const int64 to = statistic(tokens[row]);
        p.den[to] = den;
        const bool none = m[half] == __uint_as_float(kNegativeInfinity);
        if (p.m) p.m[to] = none ? 0.f : m[half] * kLn2;
      }
    }
    __syncwarp();
    constexpr int chunks = kV / 8;
#pragma unroll 1
    for (int c = lane(); c < 16 * chunks; c += 32) {
      const int row = c / chunks, column = c % chunks * 8;
      if (i + row >= at.length || at.column + column >= p.V) continue;
      T* to = row_of<T>(p.o, at.batch, at.head, tokens[row]) + at.column;
      const Chunk<T> x = *reinterpret_cast<const Chunk<T>*>(y.at(row, column / 8));
      if (p.wide) {
        store_chunk<T, true>(to, column, p.V - at.column, x);
      } else {
        store_chunk<T, false>(to, column, p.V - at.column, x);
      }
    }
    __syncwarp();  // before the next queries arrive
  }
  Tile<T, kD> q, k, k_sink;
  Tile<T, kV> v, v_sink, kv;
  Tile<T, kF> phi_k;
  Tile<T, 8> ksum;
  Tile<T, kf> weight_q, weight_k;

  int held[kSlots] = {-1, -1, -1};  // the tiles of keys in shared memory
  float bound;                      // of the initial ksum

  float m[2];  // of the thread's rows: the maximum, in powers of 2
  unsigned phi_q[kF / 16][4];
  float acc[kSum + 1][4];  // of the warp's queries, the denominator in column kSum
  State<T, kf, kSides, kV> state;
};

}  // namespace cuda
}  // namespace lol
