// Attention forward (SPEC 3, 4) by tensor cores, in one pass over the tokens.
//
//   y_i = (g sum_W e^(s_ij - m_i) v_j + lam phi_q (kv + sum_N phi_j v_j)) / (the same with v = 1)
//
// A block takes a sequence or a segment of it, a query head and kV columns of the values, and walks
// chunks of kChunk queries; a warp has 16 of them. The state of the keys before the oldest tile
// that a chunk weighs pair by pair stays in registers, divided among the warps by its rows, and is
// handed round in shared memory, rounded, before the chunk adds its oldest tiles to it.
//
// Tiles of keys are walked from the newest to the oldest, sinks first: a query meets all its
// softmax keys before its first linear one, so that the running maximum is final when the linear
// part, which must not be rescaled, joins the same sums. Both kinds of weights of a tile share one
// product with the values. The denominator is one more column of the sums, over values of 1: it
// sums what the numerator does, rounded weights, and a query with one key gets its value. ksum is
// that column of the state.
#pragma once
#include "attention_memory.cuh"
#include "attention_state.cuh"

namespace lol {
namespace cuda {

constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kNegativeInfinity = 0xff800000u;

template <class Number, int kD, int kf, int kSides, int kV, int kChunk, int kSlots, bool kHybrid>
class Attention : AttentionMemory<Number, kD, kf, kSides, kV, kChunk, kSlots> {
  using Memory = AttentionMemory<Number, kD, kf, kSides, kV, kChunk, kSlots>;
  using T = Tiled<Number>;
  using Memory::at, Memory::p;
  using Memory::has_queries, Memory::own_queries, Memory::keys, Memory::values, Memory::tokens_at;
  using Memory::k_sink, Memory::v_sink, Memory::phi_k, Memory::kv, Memory::ksum, Memory::phi_q;
  using Memory::kF, Memory::kThreads, Memory::kWarps, Memory::kSharesQueries, Memory::kUnroll;
  using Memory::kHoldsSinks;

 public:
  __device__ __forceinline__ Attention(const AttentionParams& params, unsigned char* shared)
      : Memory(params, shared) {}

  __device__ __forceinline__ void run() {
    if (this_warp() == 0) this->find_place(kV, kChunk, kHybrid);
    __syncthreads();
    this->load_maps();
    load_state();
    if (at.begin < at.end) {
      const int first = at.begin ? at.begin - 1 : 0;
      if (attends(first)) this->load_queries(first);
      const int newest = newest_tile(first);
      this->load_tile(newest < 0 ? at.begin : newest);  // whatever is visited first
      if (sinks() && this->sinks_stay()) this->load_sinks(0);
      for (int chunk = first; chunk < at.end; chunk++) attend(chunk);
    }
    if (stores_state()) store_state();
    if (at.last && (p.mask.real || at.sequence + 1 >= p.sequences))
      this->template clear_rest<Number, kV>(kThreads);
  }

 private:
  static constexpr int kSum = kV / 8;  // the tile of sums whose first column is that of the ones

  // Linear attention has no softmax keys, and hybrid attention no state before and after.
  __device__ __forceinline__ int sinks() const { return kHybrid ? p.sink : 0; }
  __device__ __forceinline__ int start_of(int query) const {
    return kHybrid ? window_start(p, query) : query + 1;
  }
  __device__ __forceinline__ bool begins_with_state() const { return !kHybrid && p.kv0; }
  __device__ __forceinline__ bool stores_state() const { return !kHybrid && at.stores; }

  __device__ __forceinline__ int first_query(int chunk) const {
    return ptx::opaque(chunk) * kChunk + 16 * this_warp();
  }
  // The oldest tile of keys that a chunk weighs pair by pair. Computed anew wherever it is needed,
  // as are the next two, so that nothing waits in registers.
  __device__ __forceinline__ int first_tile(int chunk) const {
    chunk = ptx::opaque(chunk);
    return kHybrid ? window_start(p, chunk * kChunk) / kChunk : chunk;
  }

  // The chunk before a segment stands for all before it: their keys go into the state.
  __device__ __forceinline__ bool attends(int chunk) const { return chunk >= at.begin; }
  __device__ __forceinline__ int newest_tile(int chunk) const {
    return attends(chunk) ? chunk : first_tile(chunk + 1) - 1;
  }
  __device__ __forceinline__ int oldest_tile(int chunk) const {
    return attends(chunk) ? first_tile(chunk) : 0;
  }

  // ---- A chunk

  __device__ __forceinline__ void attend(int chunk) {
#pragma unroll 1
    for (int tile = newest_tile(chunk); tile >= oldest_tile(chunk); tile--) {
      this->visit(tile, tile > oldest_tile(chunk) ? tile - 1 : chunk + 1);
      if (tile == chunk && attends(chunk)) {
        if (has_queries()) begin_queries();
        if (has_state(chunk)) state.share(kv, ksum);
        attend_sinks(chunk);
      }
      const bool leaves = absorbs(chunk, tile);
      if (leaves || tile * kChunk < last_start(chunk)) {
        if (this->has_key_features()) make_key_features(tile);
        __syncthreads();
      }
      if (has_queries() && attends(chunk))
        attend_keys<kChunk, false>(keys(tile), values(tile), chunk, tile * kChunk);
      if (leaves) state.template absorb<kChunk>(phi_k, values(tile));
    }
    if (attends(chunk)) {
      if (has_state(chunk)) {
        __syncthreads();
        this->load_ahead(chunk + 1);
        if (has_queries()) read_state();
      }
      if (has_queries()) store_outputs(chunk);
    }
    if (chunk + 1 < at.end) this->load_queries(chunk + 1);
  }
  __device__ __forceinline__ void attend_sinks(int chunk) {
#pragma unroll 1
    for (int first = 0; first < sinks() && first < (chunk + 1) * kChunk; first += kSinks) {
      if (!this->sinks_stay()) {
        __syncthreads();
        this->load_sinks(first);
        ptx::cp_async_wait<0>();
        __syncthreads();
      }
      if (has_queries()) attend_keys<kSinks, true>(k_sink, v_sink, chunk, first);
    }
    if (!kHoldsSinks && sinks()) __syncthreads();  // before phi_k comes to their place
  }
  // The start of the window of a chunk's last query.
  __device__ __forceinline__ int last_start(int chunk) const {
    return start_of(ptx::opaque(chunk) * kChunk + kChunk - 1);
  }
  __device__ __forceinline__ bool has_state(int chunk) const {
    return first_tile(chunk) > 0 || begins_with_state();
  }
  // Whether the state of the next chunk has the tile.
  __device__ __forceinline__ bool absorbs(int chunk, int tile) const {
    const int next = chunk + 1;
    return tile < first_tile(next) && (stores_state() || next < at.end);
  }

  __device__ __forceinline__ void begin_queries() {
    // Zeros from column f on, whatever the keys have there.
    make_features<kf, kSides>(this_lane(), phi_q, own_queries(), this->query_map(), p.activation,
                              p.f, [&](int, int) { return at.lambda; });
#pragma unroll
    for (int n = 0; n <= kSum; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[n][e] = 0.f;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) m[half] = __uint_as_float(kNegativeInfinity);
    __syncwarp();
  }

  // phi_k of a tile; zero for keys that do not exist and for sinks, which the state does not take.
  __device__ __forceinline__ void make_key_features(int tile) {
    const int lane = this_lane(), first = this->first_key();
    LeftFeatures<T, kF, true> features = {phi_k, first};
    make_features<kf, kSides>(lane, features, keys(tile).rows(first), this->key_map(), p.activation,
                              kf, [&](int side, int half) {
                                const int j = tile * kChunk + first + lane / 4 + 8 * half;
                                return j < at.length && j >= sinks() && side < p.sides ? 1.f : 0.f;
                              });
  }

  // The warp's queries, and two of their rows, which a thread has.
  struct Queries {
    int first;                    // of them
    int first_start, last_start;  // the start of the window of the first one, and of the last one
    int row;                      // the thread's first row; the second one is 8 further
    int start[2];                 // of the windows of the thread's rows
  };
  __device__ __forceinline__ Queries queries_of(int lane, int chunk) const {
    const int i = first_query(chunk), row = i + lane / 4;
    return {i, start_of(i), start_of(i + 15), row, {start_of(row), start_of(row + 8)}};
  }

  // Adds keys to the sums of the warp's queries: those of a tile that starts at j, or the sinks.
  // Groups of 16 keys that no query of the warp attends are passed over.
  template <int kKeys, bool kAreSinks>
  __device__ __forceinline__ void attend_keys(const Tile<T, kD>& keys, const Tile<T, kV>& values,
                                              int chunk, int j) {
    constexpr int groups = kKeys / 16;
    const int lane = this_lane();
    const Queries own = queries_of(lane, chunk);
    bool near[groups], far[groups], any_near = false;
#pragma unroll
    for (int g = 0; g < groups; g++) {
      const int key = j + 16 * g;
      near[g] = kHybrid && key <= own.first + 15 && (kAreSinks || key + 15 >= own.first_start);
      far[g] = !kAreSinks && key < own.last_start;
      any_near |= near[g];
    }
    float s[2 * groups][4] = {};
    if (kHybrid && any_near) add_softmax_weights<kAreSinks>(lane, s, near, own, keys, j);
#pragma unroll
    for (int g = 0; g < groups; g++) {
      if (far[g]) add_linear_weights(lane, s[2 * g], s[2 * g + 1], own.start, j, 16 * g);
      if (near[g] || far[g]) {
        Pair<T> a[4];
        pack_left<T>(a, s[2 * g], s[2 * g + 1]);
        add_values(lane, a, values, 16 * g);
        // Without the denominator, which has the same error, rounding a weight would show in y.
        if (!kHybrid && !p.normalize) {
          subtract_rounded<T>(s[2 * g], s[2 * g + 1], a);
          pack_left<T>(a, s[2 * g], s[2 * g + 1]);
          add_values(lane, a, values, 16 * g);
        }
      }
    }
  }

  // Weights times 16 values, and times ones.
  __device__ __forceinline__ void add_values(int lane, const Pair<T> (&weights)[4],
                                             const Tile<T, kV>& values, int first) {
    multiply_row<kV>(lane, acc, weights, values, first);
    multiply_ones<T>(lane, acc[kSum], weights);
  }

  // s += g e^(q k - m), m being the new maximum, of the groups of keys that are near.
  template <bool kAreSinks, int groups>
  __device__ __forceinline__ void add_softmax_weights(int lane, float (&s)[2 * groups][4],
                                                      const bool (&near)[groups],
                                                      const Queries& own, const Tile<T, kD>& keys,
                                                      int j) {
    constexpr int kAtOnce = kUnroll < 4 ? kUnroll : 4;  // more is more code, and untimed
#pragma unroll kAtOnce
    for (int d = 0; d < kD; d += 16) {
      Pair<T> a[4];
      load_left(lane, a, own_queries(), 0, d);
#pragma unroll
      for (int g = 0; g < groups; g++) {
        if (!near[g]) continue;
        Pair<T> b[4];
        load_right_transposed(lane, b, keys, d, 16 * g);
        multiply<T>(s[2 * g], s[2 * g + 1], a, b);
      }
    }
    float top[2] = {m[0], m[1]}, shift[2];
#pragma unroll
    for (int g = 0; g < groups; g++)
      if (near[g]) scale_scores<kAreSinks>(lane, s[2 * g], s[2 * g + 1], top, own, j + 16 * g);
    rescale_sums(shift, top);
#pragma unroll
    for (int g = 0; g < groups; g++) {
      if (!near[g]) continue;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[2 * g][e] = ptx::exp2_approx(s[2 * g][e] + shift[e / 2]);
        s[2 * g + 1][e] = ptx::exp2_approx(s[2 * g + 1][e] + shift[e / 2]);
      }
    }
  }

  // Scores of 16 keys in powers of 2, minus infinity outside of the window, and the maxima of the
  // thread's rows. Keys are compared only where some may be outside.
  template <bool kAreSinks>
  __device__ __forceinline__ void scale_scores(int lane, float (&left)[4], float (&right)[4],
                                               float (&top)[2], const Queries& own, int key) {
    const float unit = p.scale * kLog2e;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      left[e] *= unit;
      right[e] *= unit;
    }
    if (kAreSinks || key < own.last_start || key < sinks() || key + 15 > own.first) {
      const int column = key + column_of(lane, 0);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = own.row + 8 * half;
        const int first = kAreSinks ? 0 : at_least(own.start[half], sinks()) - column;
        const int last = (kAreSinks ? at_most(row, sinks() - 1) : row) - column;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (e < first || e > last) left[2 * half + e] = __uint_as_float(kNegativeInfinity);
          if (e + 8 < first || e + 8 > last)
            right[2 * half + e] = __uint_as_float(kNegativeInfinity);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) top[e / 2] = fmaxf(top[e / 2], fmaxf(left[e], right[e]));
  }

  // The sums in units of the new maxima, and what scores are shifted by: the maxima and the gate.
  __device__ __forceinline__ void rescale_sums(float (&shift)[2], const float (&own_top)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float before = m[half];
      m[half] = quad_max(own_top[half]);
      const float top = fmaxf(m[half], kLowest);  // so that nothing is not subtracted from nothing
      const float rescale = ptx::exp2_approx(before - top);
      shift[half] = at.log2_gate - top;
#pragma unroll
      for (int n = 0; n <= kSum; n++) {
        acc[n][2 * half] *= rescale;
        acc[n][2 * half + 1] *= rescale;
      }
    }
  }

  // w += phi_q phi_k of the keys that have left the window, 16 of them from j + key on.
  __device__ __forceinline__ void add_linear_weights(int lane, float (&left)[4], float (&right)[4],
                                                     const int (&start)[2], int j, int key) {
    float w[2][4] = {};
#pragma unroll kSharesQueries ? kUnroll : kF / 16
    for (int f = 0; f < kF; f += 16) {
      Pair<T> a[4], b[4];
      phi_q.load(lane, a, f);
      load_right_transposed(lane, b, phi_k, f, key);
      multiply<T>(w[0], w[1], a, b);
    }
    const int own = j + key + column_of(lane, 0), first = sinks() - own;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int column = e % 2, end = start[e / 2] - own;
      left[e] += column < end && column >= first ? w[0][e] : 0.f;
      right[e] += column + 8 < end && column + 8 >= first ? w[1][e] : 0.f;
    }
  }

  // ---- The state

  __device__ __forceinline__ void load_state() {
    state.clear();
    if (!begins_with_state()) return;
    state.template move<true>(const_cast<float*>(p.kv0), const_cast<float*>(p.ksum0),
                              this->state_row(), p.sides, p.f, p.V, at.column);
  }
  __device__ __forceinline__ void store_state() {
    state.template move<false>(p.kv, p.ksum, this->state_row(), p.sides, p.f, p.V, at.column);
  }
  // Adds what the queries read from the state.
  __device__ __forceinline__ void read_state() {
    const int lane = this_lane();
#pragma unroll kSharesQueries ? kUnroll : kF / 16
    for (int f = 0; f < kF; f += 16) {
      Pair<T> a[4], b[2];
      phi_q.load(lane, a, f);
      multiply_row<kV>(lane, acc, a, kv, f);
      load_right(lane, b, ksum, f);
      mma_m16n8k16<T>(acc[kSum], a, b);
    }
  }

  // ---- Results

  // Of the warp's queries. The rows of y are put together where
  // the queries were.
  __device__ __forceinline__ void store_outputs(int chunk) {
    const int lane = this_lane(), i = first_query(chunk);
    const Tokens tokens = tokens_at(i);
    const Tile<T, kV> y = {own_queries().data};
    const float factor = kHybrid ? 1.f : p.scale;
    __syncwarp();  // all lanes are done with the queries
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float den = acc[kSum][2 * half] + acc[kSum][2 * half + 1];  // the state's is in both columns
      den = p.eps + factor * __shfl_sync(~0u, den, lane & ~3);
      if (!p.normalize) den = 1.f;
      const float scale = factor / den;
#pragma unroll
      for (int n = 0; n < kSum; n++)
        y.pair(lane / 4 + 8 * half, column_of(lane, n) / 2) =
            pack<T>(scale * acc[n][2 * half], scale * acc[n][2 * half + 1]);
      const int row = lane / 4 + 8 * half;
      if (at.column == 0 && lane % 4 == 0 && i + row < at.length) {
        const int64 to = this->statistic(tokens[row]);
        p.den[to] = den;
        const bool none = m[half] == __uint_as_float(kNegativeInfinity);
        if (p.m) p.m[to] = none ? 0.f : m[half] * kLn2;
      }
    }
    __syncwarp();
    constexpr int kPer = kPerChunk<Number>, kPieces = kV / kPer;
#pragma unroll 1
    for (int c = lane; c < 16 * kPieces; c += 32) {
      const int row = c / kPieces, column = c % kPieces * kPer;
      if (i + row >= at.length || at.column + column >= p.V) continue;
      Number* to = row_of<Number>(p.o, at.batch, at.head, tokens[row]) + at.column;
      const Chunk<Number> x = chunk_of<Number>(y.at(row, column / 8) + column % 8);
      if (p.wide) {
        store_chunk<Number, true>(to, column, p.V - at.column, x);
      } else {
        store_chunk<Number, false>(to, column, p.V - at.column, x);
      }
    }
    __syncwarp();  // before the next queries arrive
  }
  float m[2];              // of the thread's rows: the maximum, in powers of 2
  float acc[kSum + 1][4];  // of the warp's queries, the denominator in column kSum
  State<T, kf, kSides, kV, kWarps> state;
};

}  // namespace cuda
}  // namespace lol
