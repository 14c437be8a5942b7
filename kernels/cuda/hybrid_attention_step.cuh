// hybrid_attention_step_ (SPEC 5): T new tokens on states of a pool, in place.
//
//   y_i = (g sum_W e^(s_ij - m_i) v_j + lam phi_q (kv + sum_L phi_j v_j)) / (the same without v)
//
// A block owns the state of one head of one sequence, with all query heads that read it, so that
// kv and ksum need no other block: they are read once and written once, 8 F V bytes. Its 16 groups
// of kLanes threads hold the state in registers: thread (group, lane) has the rows group + 16 r of
// columns 4 lane .. 4 lane + 3. These loads and the copies of the window's keys and values into
// shared memory start before anything is computed, and all of them are in flight at once.
//
// Queries come kRows at a time, a query being a new token and a head. Softmax sums over the tiles
// of keys first, then token by token: fold the keys that leave, read the state, add the pairs of
// keys that have left the window but not the ring. Columns are summed over the groups at the end
// only.
//
// Ring rows that other blocks may still read, and the counters, are written by the last block of a
// sequence to arrive. Blocks count themselves in the upper half of the sequence's `length`, which
// is zero again afterwards: positions have 31 bits.
#pragma once
#include "step_block.cuh"

namespace lol {
namespace cuda {

template <class T, int kLanes, int kPerThread, bool kWide>
class Step : StepBlock {
 public:
  static constexpr int kThreads = kGroups * kLanes, kColumns = 4 * kLanes;

  __device__ Step(const StepParams& params, unsigned char* shared_memory)
      : StepBlock(params, shared_memory) {}

  __device__ void run() {
    if (threadIdx.x == 0) find_sequence();
    __syncthreads();
    if (s().count == 0) return;
    tile_of_keys = -1;
    for (column = 0; column < p.V; column += kColumns) {
      load_state();
      folded = s().begin;
      batch_begin = batch_end = 0;
      tile = -1;
      if (s().keys > 0) copy_tile(0);
      for (int query = 0; query < s().count * s().heads; query += kRows) attend(query);
      store_state();
    }
    __syncthreads();  // before what this block has read is overwritten
    if (p.Hs == p.Hk) remember(s().kv_head);
    if (!is_last()) return;
    for (int other = 0; p.Hs != p.Hk && other < p.Hk; other++) remember(other);
    if (threadIdx.x == 0) {
      p.length[2 * s().slot] = s().total;
      if (p.Hs > 1) atomicExch(arrived(), 0u);
      p.folded[s().slot] = s().folded_after;
    }
  }

 private:
  struct Thread : ThreadOfBlock {
    __device__ int column() const { return index % kLanes; }  // of four
    __device__ int group() const { return index / kLanes; }
  };
  static __device__ Thread this_thread() { return {StepBlock::this_thread()}; }

  // ---- The sequence

  // Key and value at a position: new ones, or where they are remembered.
  __device__ void find_row(int position, const T** k, const T** v) const {
    if (position >= s().past) {
      const int64 row = s().first_row + position - s().past;
      *k = row_of<T>(p.k, s().batch, s().kv_head, row);
      *v = row_of<T>(p.v, s().batch, s().kv_head, row);
      return;
    }
    const bool sink = position < p.sink;
    int index = position;
    if (!sink) {
      index += s().past_in_ring - s().past;
      if (index < 0) index += p.ring;
    }
    const int64 store = s().slot * p.Hk + s().kv_head,
                row = store * (sink ? p.sink : p.ring) + index;
    *k = static_cast<const T*>(sink ? p.k_sink : p.k_ring) + row * p.map.D;
    *v = static_cast<const T*>(sink ? p.v_sink : p.v_ring) + row * p.V;
  }
  // A warp copies a row as floats, filled up with zeros to `columns` of them, a multiple of 8.
  __device__ void load_row(float* to, int columns, const T* row, int width) {
    const Thread me = this_thread();
    constexpr int per = kPerChunk<T>;
#pragma unroll 1
    for (int first = me.lane() * per; first < columns; first += 32 * per) {
      Chunk<T> chunk = {};
      if (first < width) chunk = load_chunk<T, kWide>(row, first, width);
      store_floats(to + first, chunk);
    }
  }

  // ---- The state

  __device__ void load_state() {
    const Thread me = this_thread();
    const float* rows = kv_of_head() + column;
#pragma unroll
    for (int r = 0; r < kPerThread; r++) {
      const int i = me.group() + kGroups * r;
      kv[r] = i < p.map.F ? load_quad<kWide>(rows + i * p.V, me.column(), p.V - column) : zero4();
    }
    for (int i = me.index; i < p.map.F; i += kThreads) ksum()[i] = ksum_of_head()[i];
  }
  __device__ void store_state() {
    const Thread me = this_thread();
    if (s().begin == s().end) return;
    float* rows = kv_of_head() + column;
#pragma unroll
    for (int r = 0; r < kPerThread; r++) {
      const int i = me.group() + kGroups * r;
      if (i < p.map.F) store_quad<kWide>(rows + i * p.V, me.column(), p.V - column, kv[r]);
    }
    if (column + kColumns < p.V) return;
    for (int i = me.index; i < p.map.F; i += kThreads) ksum_of_head()[i] = ksum()[i];
  }

  // Features and values of the keys from `position` on that leave in this call, kRows at most.
  __device__ void bring(int position) {
    const Thread me = this_thread();
    if (position >= batch_begin && position < batch_end) return;
    batch_begin = position;
    batch_end = at_most(position + kRows, at_least(s().last_start, s().end));
    const int rows = batch_end - batch_begin;
    __syncthreads();
    const int r = me.warp();  // a warp takes a key
    if (r < rows) {
      const T *k, *v;
      find_row(position + r, &k, &v);
      load_row(x() + r * p.map.ld, p.map.ld, k, p.map.D);
      load_row(at<float>(p.shared.leaving) + r * kColumns, kColumns, v + column, p.V - column);
    }
    __syncthreads();
    const auto map_of = [&](int) { return s().head; };
    features<kThreads, kWide>(buffers(x()), p.map_k, map_of, true, p.activation, rows, p.map,
                              phi_k());
  }

  // Adds key r of phi_k to the state.
  __device__ void fold(int r) {
    const Thread me = this_thread();
    const float4 v = leaving()[r * kLanes + me.column()];
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      const int i = me.group() + kGroups * k;
      if (i < p.map.F) kv[k] = fma4(phi_k()[i * kRows + r], v, kv[k]);
    }
    for (int i = me.index; i < p.map.F; i += kThreads) ksum()[i] += phi_k()[i * kRows + r];
  }

  // ---- The window

  // Starts copying keys [wanted, wanted + 1) * p.keys, unless they are there, and the slice of
  // their values.
  __device__ void copy_tile(int wanted) {
    const Thread me = this_thread();
    if (wanted == tile) return;
    tile = wanted;
    const bool with_keys = wanted != tile_of_keys;
    tile_of_keys = wanted;
    constexpr int per = kPerChunk<T>;
    const int key = tile * p.keys, rows = at_most(s().keys - key, p.keys);
#pragma unroll 1
    for (int row = me.warp(); row < rows; row += kThreads / 32) {  // a warp takes a key
      const T *k, *v;
      find_row(position_of(key + row), &k, &v);
      const int first = me.lane() * per;
#pragma unroll 1
      for (int c = first; with_keys && c < p.map.D; c += 32 * per)
        copy_chunk(k_tile(row) + c, k, c, p.map.D);
#pragma unroll 1
      for (int c = first; c < kColumns; c += 32 * per)
        copy_chunk(v_tile() + row * kColumns + c, v + column, c, p.V - column);
    }
    ptx::cp_async_commit();
  }
  __device__ void copy_chunk(T* to, const T* row, int first, int width) {
    if constexpr (kWide) {
      ptx::cp_async<16>(to, row + (first < width ? first : 0), first < width ? 16 : 0);
    } else {
      *reinterpret_cast<Chunk<T>*>(to) = load_chunk<T, false>(row, first, width);
    }
  }

  // scores()[r][key] in powers of 2: four threads a key, with every fourth chunk of D each.
  __device__ void score_tile(int rows) {
    const Thread me = this_thread();
    constexpr int per = kPerChunk<T>, parts = 4;
    const int part = me.index % parts, first = tile * p.keys;
    const int in_tile = at_most(s().keys - first, p.keys);
    const int r = part;  // the row that this thread stores
    const int i = queries()[r].position, start = queries()[r].start;
#pragma unroll 1
    for (int key = me.index / parts; key < (in_tile + 7) / 8 * 8; key += kThreads / parts) {
      float dot[kRows] = {};
      if (key < in_tile) {
        const T* k = k_tile(key);
#pragma unroll 1  // a chunk of every row at a time
        for (int d = part * per; d < p.map.D; d += parts * per) {
          const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(k + d);
#pragma unroll
          for (int row = 0; row < kRows; row++) {
            if (row < rows) dot[row] += dot_chunk(q() + row * p.map.ld + d, chunk);
          }
        }
      }
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        dot[row] += __shfl_xor_sync(~0u, dot[row], 1);
        dot[row] += __shfl_xor_sync(~0u, dot[row], 2);
      }
      const float own = of_row(dot, r);
      const int position = position_of(first + key);
      const bool seen = position <= i && (position >= start || position < p.sink);
      if (r < rows && key < in_tile)
        scores()[r * p.keys + key] = seen ? own * p.scale * kLog2e : kLowest;
    }
  }

  __device__ float4 value_quad(int key) const {
    const Thread me = this_thread();
    const T* v = v_tile() + key * kColumns + 4 * me.column();
    return make_float4(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3]));
  }

  // acc = the softmax part of `rows` queries, before the gate.
  __device__ void attend_window(int rows) {
    const Thread me = this_thread();
    for (int wanted = 0; wanted * p.keys < s().keys; wanted++) {
      if (wanted != tile) __syncthreads();  // the tile before has been read
      copy_tile(wanted);
      ptx::cp_async_wait<0>();
      __syncthreads();
      score_tile(rows);
      __syncthreads();
      weigh_tile(tile, rows);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (r < rows) acc[r] = scale4(queries()[r].factor, acc[r]);
      }
      const int in_tile = at_most(s().keys - tile * p.keys, p.keys);
#pragma unroll 2
      for (int key = me.group(); key < in_tile; key += kGroups) {
        const float4 v = value_quad(key);
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (r < rows) acc[r] = fma4(scores()[r * p.keys + key], v, acc[r]);
        }
      }
    }
  }

  // ---- Queries

  // Outputs of kRows queries; all heads of one token come before the next token.
  __device__ void attend(int first_query) {
    const int rows = at_most(s().count * s().heads - first_query, kRows);
    load_queries(first_query, rows);
    attend_window(rows);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r < rows) acc[r] = scale4(queries()[r].gate, acc[r]);
    }
    for (int from = 0, to; from < rows; from = to) {  // token by token
      for (to = from + 1; to < rows && queries()[to].token == queries()[from].token;) to++;
      attend_past(from, to);
    }
    store_outputs(rows);
  }

  // q and lambda phi_q, for phi_q has no other use; acc = 0.
  __device__ void load_queries(int first_query, int rows) {
    const Thread me = this_thread();
    __syncthreads();  // the queries before are done
    if (me.index < kRows) {
      Query own;
      own.token = (first_query + me.index) / s().heads;
      own.head = s().head * s().heads + (first_query + me.index) % s().heads;
      own.map = own.head / p.map_q.group;
      own.position = s().past + own.token;
      own.start = start_of(own.position);
      own.gate = 1.f / (1.f + exp2f(-kLog2e * p.gate[own.head]));
      own.m = kLowest;
      own.l = own.factor = own.den = 0.f;
      queries()[me.index] = own;
    }
    __syncthreads();
    const int r = me.warp();  // a warp takes a query
    if (r < rows) {
      const Query& own = queries()[r];
      const T* row = row_of<T>(p.q, s().batch, own.head, s().first_row + own.token);
      load_row(q() + r * p.map.ld, p.map.ld, row, p.map.D);
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) acc[i] = zero4();
    __syncthreads();
    const auto map_of = [&](int i) { return queries()[i].map; };
    const bool shared_map = s().heads == 1 || p.map_q.group >= s().heads;
    features<kThreads, kWide>(buffers(q()), p.map_q, map_of, shared_map, p.activation, rows, p.map,
                              phi_q());
    if (!p.affine) return;
    if (r < rows) {
      const float lambda = 1.f - queries()[r].gate;
      for (int i = me.lane(); i < p.map.F; i += 32) phi_q()[i * kRows + r] *= lambda;
    }
    __syncthreads();
  }

  // Adds the keys that have left the window of a token to its queries, the rows [from, to).
  __device__ void attend_past(int from, int to) {
    const Thread me = this_thread();

    const bool own = me.warp() >= from && me.warp() < to;  // a warp sums the denominator of a row
    const int start = queries()[from].start, fold_to = at_most(start, s().end);
    float den = 0.f;
    __syncthreads();  // the token before is done with ksum and pairs
    for (int position = folded; position < start;) {
      bring(position);
      const int last = at_most(batch_end, start) - batch_begin;
      for (; folded < at_most(fold_to, batch_end); folded++) fold(folded - batch_begin);
      const int first = at_least(folded, position) - batch_begin;
      if (first < last) {
        if (own) den += weigh_pairs(me.warp(), first, last);
        __syncthreads();
        add_pairs(from, to, first, last);
      }
      position = batch_begin + last;
    }
    read_state(from, to);
    __syncthreads();
    for (int f = me.lane(); own && f < p.map.F; f += 32)
      den += phi_q()[f * kRows + me.warp()] * ksum()[f];
    den = warp_sum(den);
    if (own && me.lane() == 0)
      queries()[me.warp()].den = queries()[me.warp()].gate * queries()[me.warp()].l + den;
  }

  __device__ void read_state(int from, int to) {
    const Thread me = this_thread();
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      const int i = me.group() + kGroups * k;
      if (i >= p.map.F) continue;
      const float4 phi = *reinterpret_cast<const float4*>(phi_q() + i * kRows);
      const float of_row[kRows] = {phi.x, phi.y, phi.z, phi.w};
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (r >= from && r < to) acc[r] = fma4(of_row[r], kv[k], acc[r]);
      }
    }
  }

  __device__ void add_pairs(int from, int to, int first, int last) {
    const Thread me = this_thread();
    if (me.group() < first || me.group() >= last) return;  // group j adds key j
    const float4 v = leaving()[me.group() * kLanes + me.column()];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r >= from && r < to) acc[r] = fma4(pairs()[r * kRows + me.group()], v, acc[r]);
    }
  }

  // y, from what the groups have summed.
  __device__ void store_outputs(int rows) {
    const Thread me = this_thread();
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (r < rows) partial()[r * kThreads + me.index] = acc[r];
    }
    __syncthreads();
    constexpr int per = kPerChunk<T>, chunks = kColumns / per;
#pragma unroll 1
    for (int c = me.index; c < rows * chunks; c += kThreads) {
      const int r = c / chunks, first = c % chunks * per;
      if (column + first >= p.V) continue;
      const float factor = 1.f / queries()[r].den;
      Chunk<T> y;
#pragma unroll
      for (int quad = 0; quad < per / 4; quad++) {
        float4 sum = zero4();
#pragma unroll 4  // so that few registers wait for loads
        for (int g = 0; g < kGroups; g++)
          sum = add4(sum, partial()[r * kThreads + g * kLanes + first / 4 + quad]);
        y.at[4 * quad] = from_float<T>(factor * sum.x);
        y.at[4 * quad + 1] = from_float<T>(factor * sum.y);
        y.at[4 * quad + 2] = from_float<T>(factor * sum.z);
        y.at[4 * quad + 3] = from_float<T>(factor * sum.w);
      }
      const Query& own = queries()[r];
      T* o = row_of<T>(p.o, s().batch, own.head, s().first_row + own.token) + column;
      store_chunk<T, kWide>(o, first, p.V - column, y);
    }
  }

  // ---- What the next call finds

  // The new tokens of a key/value head, into ring and sinks.
  __device__ void remember(int of_head) {
    remember(p.k, p.k_ring, p.k_sink, p.map.D, of_head);
    remember(p.v, p.v_ring, p.v_sink, p.V, of_head);
  }
  __device__ void remember(const Rows& x, void* ring, void* sink, int width, int of_head) {
    const Thread me = this_thread();
    constexpr int per = kPerChunk<T>;
    const int64 store = s().slot * p.Hk + of_head;
#pragma unroll 1
    for (int t = me.warp(); t < s().count; t += kThreads / 32) {  // a warp takes a token
      const int position = s().past + t;
      const T* row = row_of<T>(x, s().batch, of_head, s().first_row + t);
#pragma unroll 1
      for (int c = me.lane() * per; c < width; c += 32 * per) {
        const Chunk<T> chunk = load_chunk<T, kWide>(row, c, width);
        if (position >= s().total - p.ring) {
          const int64 to = store * p.ring + position % p.ring;
          store_chunk<T, kWide>(static_cast<T*>(ring) + to * width, c, width, chunk);
        }
        if (position < p.sink) {
          const int64 to = store * p.sink + position;
          store_chunk<T, kWide>(static_cast<T*>(sink) + to * width, c, width, chunk);
        }
      }
    }
  }

  __device__ T* k_tile(int key) const { return at<T>(p.shared.k + key * p.k_row); }  // [keys x D]
  __device__ T* v_tile() const { return at<T>(p.shared.v); }  // [keys x kColumns]

  int column;                  // the slice of V starts here
  int tile, tile_of_keys;      // in shared memory: values of this slice, keys
  int folded;                  // positions before it are in kv and ksum
  int batch_begin, batch_end;  // positions in phi_k and leaving
  float4 kv[kPerThread], acc[kRows];
};

// Two blocks share a multiprocessor where the state leaves registers for it (instances.h);
// elsewhere ptxas would spill to fit a second one.
template <class T, int kLanes, int kPerThread, bool kWide>
__global__ void __launch_bounds__(kGroups* kLanes, kLanes* kPerThread == 16 * 8 ? 2 : 1)
    hybrid_attention_step(const __grid_constant__ StepParams params) {
  Step<T, kLanes, kPerThread, kWide>(params, ptx::dynamic_shared<unsigned char>()).run();
}

}  // namespace cuda
}  // namespace lol
