// hybrid_attention_step_ (SPEC 5): T new tokens on states of a pool, in place.
//
//   y_i = (g sum_W e^(s_ij - m_i) v_j + lam phi_q (kv + sum_L phi_j v_j)) / (the same without v)
//
// A block owns the state of one head of one sequence, with all query heads that read it, so that
// kv and ksum need no other block: they are read once and written once, 8 F V bytes. Its groups of
// kLanes threads hold the state in registers: thread (group, lane) has the rows group + kGroups r
// of columns 4 lane .. 4 lane + 3. These loads and the copies of the window's keys and values into
// shared memory start before anything is computed, and all of them are in flight at once.
//
// Queries come kQueries at a time, a query being a new token and a head. What follows is a chain of
// short stages between barriers, which bounds a step more than its arithmetic; so half of the
// threads make the features of the queries while the other half makes those of the keys that leave,
// and scores are computed beside them. Softmax sums over the tiles of keys come first, then token
// by token: fold the keys that leave, read the state, add the pairs of keys that have left the
// window but not the ring. Columns are summed over the groups at the end only.
//
// Ring rows that other blocks may still read, and the counters, are written by the last block of a
// sequence to arrive. Blocks count themselves in the upper half of the sequence's `length`, which
// is zero again afterwards: positions have 31 bits. They do so before they store the state: to wait
// for stores as well would be to wait for memory.
#pragma once
#include "step_keys.cuh"

namespace lol {
namespace cuda {

template <class T, int kLanes, int kPerThread, int kQueries, bool kWide>
class Step : StepKeys<T, kLanes, kQueries, kWide> {
  using Block = StepBlock<kQueries>;
  using Keys = StepKeys<T, kLanes, kQueries, kWide>;
  using Block::ksum, Block::pairs, Block::queries, Block::scores, Block::partial, Block::is_last;
  using Block::ksum_of_head, Block::kv_of_head, Block::position_of, Block::start_of;
  using Block::p, Block::s, Block::q, Block::x, Block::phi_q, Block::phi_k, Block::leaving;
  using Keys::column, Keys::tile, Keys::tile_of_keys, Keys::copy_tile, Keys::k_tile, Keys::v_tile;
  using Keys::load_row, Keys::remember, Keys::rows_of_head;

 public:
  using Keys::kThreads, Keys::kColumns;
  static constexpr int kGroups = kThreads / kLanes, kHalf = kThreads / 2;

  __device__ Step(const StepParams& params, unsigned char* shared_memory)
      : Keys(params, shared_memory) {}

  __device__ void run() {
    if (threadIdx.x == 0) this->find_sequence();
    if (p.cu_seqlens.data && blockIdx.x / p.Hs + 1 >= p.sequences) clear_rest();
    __syncthreads();
    if (s().count == 0) return;
    tile_of_keys = -1;
    for (column = 0; column < p.V; column += kColumns) {
      load_state();
      folded = s().begin;
      batch_begin = batch_end = 0;
      tile = -1;
      for (int query = 0; query < s().count * s().heads; query += kQueries) attend(query);
      if (column + kColumns >= p.V) this->arrive();
      store_state();
    }
    __syncthreads();  // before what this block has read is overwritten; is_last is there
    if (p.Hs == p.Hk) remember(s().kv_head);
    if (!*is_last()) return;
    for (int other = 0; p.Hs != p.Hk && other < p.Hk; other++) remember(other);
    if (threadIdx.x == 0) {
      p.length[2 * s().slot] = s().total;
      if (p.Hs > 1) atomicExch(this->arrived(), 0u);
      p.folded[s().slot] = s().folded_after;
    }
  }

 private:
  struct Thread : ThreadOfBlock {
    __device__ int column() const { return index % kLanes; }  // of four
    __device__ int group() const { return index / kLanes; }
    // The two halves make features: of queries and of keys.
    __device__ bool takes_keys() const { return index >= kHalf; }
    __device__ int of_half() const { return index % kHalf; }
    __device__ int row() const { return of_half() / 32; }  // a warp takes a row
  };
  static __device__ Thread this_thread() { return {Block::this_thread()}; }
  // Loads of weights, as many as registers allow.
  static constexpr int kInFlight = kQueries == 1 ? 8 : kLanes == 32 ? 1 : 2;
  // Whether there is a query r among `rows`.
  static __device__ bool is_query(int r, int rows) { return kQueries == 1 || r < rows; }

  // Tokens after the last sequence belong to none: y = 0.
  __device__ void clear_rest() {
    const int heads = p.H / p.Hs, first = blockIdx.x % p.Hs * heads;
    for (int64 token = index_at(p.cu_seqlens, p.sequences); token < p.T; token++) {
      for (int i = threadIdx.x; i < heads * p.V; i += kThreads)
        row_of<T>(p.o, 0, first + i / p.V, token)[i % p.V] = T{};
    }
  }

  // ---- The state

  __device__ void load_state() {
    const Thread me = this_thread();
    const int rows = p.map.F - me.group(), width = p.V - column;
    const float* row = kv_of_head() + column + me.group() * p.V;
#pragma unroll
    for (int r = 0; r < kPerThread; r++) {
      kv[r] = kGroups * r < rows ? load_quad<kWide>(row, me.column(), width) : zero4();
      row += kGroups * p.V;
    }
    // Asynchronously: to wait for memory here would be to begin everything else that much later.
    for (int i = me.index; i < p.map.F; i += kThreads)
      ptx::cp_async<4>(ksum() + i, ksum_of_head() + i);
    ptx::cp_async_commit();
  }
  __device__ void store_state() {
    const Thread me = this_thread();
    if (s().begin == s().end) return;
    const int rows = p.map.F - me.group(), width = p.V - column;
    float* row = kv_of_head() + column + me.group() * p.V;
#pragma unroll
    for (int r = 0; r < kPerThread; r++) {
      if (kGroups * r < rows) store_quad<kWide>(row, me.column(), width, kv[r]);
      row += kGroups * p.V;
    }
    if (column + kColumns < p.V) return;
    for (int i = me.index; i < p.map.F; i += kThreads) ksum_of_head()[i] = ksum()[i];
  }

  __device__ bool has_brought(int position) const {
    return position >= batch_begin && position < batch_end;
  }
  // Starts to bring keys from `position` on that leave in this call, kQueries at most, and their
  // values; features follow when the threads have met. Returns how many there are.
  __device__ int load_leaving(int position) {
    const Thread me = this_thread();
    batch_begin = position;
    batch_end = at_most(position + kQueries, at_least(s().last_start, s().end));
    const int keys = batch_end - batch_begin;
    constexpr bool kApart = kHalf / 32 >= 2 * kQueries;  // other warps bring the values
    const bool apart = kApart && me.row() >= kQueries;
    const int r = apart ? me.row() - kQueries : me.row();
    if (me.takes_keys() && r < keys) {
      if (!apart)
        load_row(x() + r * p.map.ld, p.map.ld, rows_of_head(false).at(position + r), p.map.D);
      if (!kApart || apart)
        load_row(reinterpret_cast<float*>(leaving() + r * kLanes), kColumns,
                 rows_of_head(true).at(position + r) + column, p.V - column);
    }
    return keys;
  }
  __device__ void bring(int position) {
    if (has_brought(position)) return;
    __syncthreads();
    const int keys = load_leaving(position);
    __syncthreads();
    make_features(0, keys, [] {});
  }

  // phi_q, times lambda, for it has no other use, of `rows` rows of q; phi_k of `keys` rows of x.
  // The threads have met when it starts and when it returns. `beside` is done beside the last
  // stage, when what has been copied is there.
  template <class Beside>
  __device__ void make_features(int rows, int keys, const Beside& beside) {
    const Thread me = this_thread();
    const bool of_keys = me.takes_keys();
    const Maps maps = {of_keys ? p.map_k.weight : p.map_q.weight,
                       of_keys ? p.map_k.bias : p.map_q.bias, 0};
    const FeatureBuffers buffers = {partial() + of_keys * kQueries * kHalf, of_keys ? x() : q(),
                                    this->z() + of_keys * kQueries * p.map.f};
    const bool shared = of_keys || s().heads == 1 || p.map_q.group >= s().heads;
    const int count = of_keys ? keys : rows, thread = me.of_half();
    const auto map_of = [&](int r) { return of_keys ? s().head : queries()[r].map; };
    const auto scale_of = [&](int r) {
      return of_keys || !p.affine ? 1.f : affine_lambda(p.gate[queries()[r].head]);
    };
    if (count > 0)
      project<kHalf, kQueries, kInFlight, kWide>(thread, buffers, maps, map_of, shared, count,
                                                 p.map);
    ptx::cp_async_wait<0>();
    __syncthreads();
    add_shares<kHalf, kQueries>(thread, buffers, maps, map_of, count, p.map, p.activation.skip);
    __syncthreads();
    activate_rows<kHalf, kQueries>(thread, buffers, p.activation, scale_of, count, p.map,
                                   of_keys ? phi_k() : phi_q());
    beside();
    __syncthreads();
  }

  // Adds key r of phi_k to the state.
  __device__ void fold(int r) {
    const Thread me = this_thread();
    const float4 v = leaving()[r * kLanes + me.column()];
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      const int i = me.group() + kGroups * k;
      if (i < p.map.F) kv[k] = fma4(phi_k()[i * kQueries + r], v, kv[k]);
    }
    for (int i = me.index; i < p.map.F; i += kThreads) ksum()[i] += phi_k()[i * kQueries + r];
  }

  // ---- The window

  // scores()[r][key] in powers of 2: some threads a key, with a part of the chunks of D each.
  __device__ void score_tile(int rows) {
    const Thread me = this_thread();
    constexpr int per = kPerChunk<T>, parts = kQueries == 1 ? 8 : 4;
    const int part = me.index % parts, first = tile * p.keys;
    const int in_tile = at_most(s().keys - first, p.keys);
    const int r = part < kQueries ? part : 0;  // the row that this thread stores
    const int i = queries()[r].position, start = queries()[r].start;
#pragma unroll 1
    for (int key = me.index / parts; key < (in_tile + 7) / 8 * 8; key += kThreads / parts) {
      float dot[kQueries] = {};
      if (key < in_tile) {
        const T* k = k_tile(key);
#pragma unroll kQueries == 1 ? 2 : 1  // a chunk of every row at a time
        for (int d = part * per; d < p.map.D; d += parts * per) {
          const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(k + d);
#pragma unroll
          for (int row = 0; row < kQueries; row++) {
            if (is_query(row, rows)) dot[row] += dot_chunk(q() + row * p.map.ld + d, chunk);
          }
        }
      }
#pragma unroll
      for (int row = 0; row < kQueries; row++) {
#pragma unroll
        for (int by = 1; by < parts; by *= 2) dot[row] += __shfl_xor_sync(~0u, dot[row], by);
      }
      const float own = of_row(dot, r);
      const int position = position_of(first + key);
      const bool seen = position <= i && (position >= start || position < p.sink);
      if (part < kQueries && is_query(part, rows) && key < in_tile)
        scores()[r * p.keys + key] = seen ? own * p.scale * kLog2e : kLowest;
    }
  }

  __device__ float4 value_quad(int key) const {
    const Thread me = this_thread();
    const T* v = v_tile() + key * kColumns + 4 * me.column();
    return make_float4(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3]));
  }

  // acc, m and l: the softmax part of `rows` queries, before the gate. The first tile has its
  // scores.
  __device__ void attend_window(int rows) {
    for (int wanted = 0; wanted * p.keys < s().keys; wanted++) {
      if (wanted > 0) {
        __syncthreads();  // the tile before has been read
        copy_tile(wanted);
        ptx::cp_async_wait<0>();
        __syncthreads();
        score_tile(rows);
        __syncthreads();
      }
      attend_tile(rows);
    }
  }
  // Every warp finds the maxima, so that none waits for another.
  __device__ void attend_tile(int rows) {
    const Thread me = this_thread();
    const int in_tile = at_most(s().keys - tile * p.keys, p.keys);
#pragma unroll
    for (int r = 0; r < kQueries; r++) {
      if (!is_query(r, rows)) continue;
      const float* row = scores() + r * p.keys;
      float top = kLowest;
#pragma unroll 2
      for (int key = me.lane(); key < in_tile; key += 32) top = fmaxf(top, row[key]);
      top = fmaxf(m[r], warp_max(top));
      const float factor = exp2f(m[r] - top);
      m[r] = top;
      acc[r] = scale4(factor, acc[r]);
      if (me.warp() != r) continue;  // a warp sums the weights of a row
      float sum = 0.f;
#pragma unroll 2
      for (int key = me.lane(); key < in_tile; key += 32) sum += weight_of(row[key], top);
      l = l * factor + warp_sum(sum);
    }
#pragma unroll 2
    for (int key = me.group(); key < in_tile; key += kGroups) {
      const float4 v = value_quad(key);
#pragma unroll
      for (int r = 0; r < kQueries; r++) {
        if (is_query(r, rows))
          acc[r] = fma4(weight_of(scores()[r * p.keys + key], m[r]), v, acc[r]);
      }
    }
  }
  static __device__ float weight_of(float score, float top) {
    return score == kLowest ? 0.f : exp2f(score - top);
  }

  // ---- Queries

  // Outputs of kQueries queries; all heads of one token come before the next token.
  __device__ void attend(int first_query) {
    const int rows = kQueries == 1 ? 1 : at_most(s().count * s().heads - first_query, kQueries);
    if (first_query > 0 || column > 0) __syncthreads();  // the queries before are done
    if (s().keys > 0) copy_tile(0);
    load_queries(first_query, rows);
    const bool leave = folded < start_of(s().past + first_query / s().heads);
    const int keys = leave && !has_brought(folded) ? load_leaving(folded) : 0;
    __syncthreads();
    make_features(rows, keys, [&] {
      if (s().keys > 0) score_tile(rows);
    });
    attend_window(rows);
#pragma unroll
    for (int r = 0; r < kQueries; r++) {
      if (is_query(r, rows)) acc[r] = scale4(queries()[r].gate, acc[r]);
    }
    for (int from = 0, to; from < rows; from = to) {  // token by token
      for (to = from + 1; to < rows && queries()[to].token == queries()[from].token;) to++;
      attend_past(from, to);
    }
    store_outputs(rows);
  }

  // q; acc = 0.
  __device__ void load_queries(int first_query, int rows) {
    const Thread me = this_thread();
    const int r = me.row();
    if (!me.takes_keys() && r < rows) {
      Query own;
      own.token = (first_query + r) / s().heads;
      own.head = s().head * s().heads + (first_query + r) % s().heads;
      own.map = own.head / p.map_q.group;
      own.position = s().past + own.token;
      own.start = start_of(own.position);
      own.den = 0.f;
      const T* row = row_of<T>(p.q, s().batch, own.head, s().first_row + own.token);
      load_row(q() + r * p.map.ld, p.map.ld, row, p.map.D);
      own.gate = 1.f / (1.f + exp2f(-kLog2e * bounded_gate(p.gate[own.head])));
      if (me.lane() == 0) queries()[r] = own;
    }
    l = 0.f;
#pragma unroll
    for (int i = 0; i < kQueries; i++) {
      acc[i] = zero4();
      m[i] = kLowest;
    }
  }

  // Adds the keys that have left the window of a token to its queries, the rows [from, to).
  __device__ void attend_past(int from, int to) {
    const Thread me = this_thread();
    const bool own = me.warp() >= from && me.warp() < to;  // a warp sums the denominator of a row
    const int start = queries()[from].start, fold_to = at_most(start, s().end);
    float den = 0.f;
    if (from > 0) __syncthreads();  // the token before is done with ksum and pairs
    for (int position = folded; position < start;) {
      bring(position);
      const int last = at_most(batch_end, start) - batch_begin;
      for (; folded < at_most(fold_to, batch_end); folded++) fold(folded - batch_begin);
      const int first = at_least(folded, position) - batch_begin;
      if (first < last) {
        if (own) den += this->weigh_pairs(me.warp(), first, last);
        __syncthreads();
        add_pairs(from, to, first, last);
      }
      position = batch_begin + last;
    }
    read_state(from, to);
    __syncthreads();
    if (!own) return;
    for (int f = me.lane(); f < p.map.F; f += 32)
      den += phi_q()[f * kQueries + me.warp()] * ksum()[f];
    den = warp_sum(den);
    if (me.lane() == 0) queries()[me.warp()].den = queries()[me.warp()].gate * l + den;
  }

  // A number of every row, loaded at once.
  struct alignas(4 * kQueries) OfRows {
    float of_row[kQueries];
  };
  __device__ void read_state(int from, int to) {
    const Thread me = this_thread();
#pragma unroll
    for (int k = 0; k < kPerThread; k++) {
      const int i = me.group() + kGroups * k;
      if (i >= p.map.F) continue;
      const OfRows phi = reinterpret_cast<const OfRows*>(phi_q())[i];
#pragma unroll
      for (int r = 0; r < kQueries; r++) {
        if (kQueries == 1 || (r >= from && r < to)) acc[r] = fma4(phi.of_row[r], kv[k], acc[r]);
      }
    }
  }

  __device__ void add_pairs(int from, int to, int first, int last) {
    const Thread me = this_thread();
    if (me.group() < first || me.group() >= last) return;  // group j adds key j
    const float4 v = leaving()[me.group() * kLanes + me.column()];
#pragma unroll
    for (int r = 0; r < kQueries; r++) {
      if (kQueries == 1 || (r >= from && r < to))
        acc[r] = fma4(pairs()[r * kQueries + me.group()], v, acc[r]);
    }
  }

  // y, from what the groups have summed.
  __device__ void store_outputs(int rows) {
    const Thread me = this_thread();
#pragma unroll
    for (int r = 0; r < kQueries; r++) {
      if (is_query(r, rows)) partial()[r * kThreads + me.index] = acc[r];
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

  int folded;                  // positions before it are in kv and ksum
  int batch_begin, batch_end;  // positions in phi_k and leaving
  float4 kv[kPerThread], acc[kQueries];
  float m[kQueries], l;  // the maximum of a row's scores, in powers of 2; the sum of its weights
};

// As many blocks as have room in the registers of a multiprocessor, with what a thread has of the
// state and of the queries; for more, ptxas would spill.
constexpr int step_blocks(int lanes, int rows, int queries) {
  if (queries > 1) return lanes * rows == 128 ? 2 : 1;
  return 1024 / (lanes * rows);
}
template <class T, int kLanes, int kPerThread, int kQueries, bool kWide>
__global__ void __launch_bounds__(step_threads(kLanes, kQueries),
                                  step_blocks(kLanes, kPerThread, kQueries))
    hybrid_attention_step(const __grid_constant__ StepParams params) {
  Step<T, kLanes, kPerThread, kQueries, kWide>(params, ptx::dynamic_shared<unsigned char>()).run();
}

}  // namespace cuda
}  // namespace lol
