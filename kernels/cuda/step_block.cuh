// What a block of hybrid_attention_step_ knows and does whatever the number type: its sequence, its
// queries, its shared memory, and the weights of keys that have left the window.
#pragma once
#include "features.cuh"
#include "window.cuh"

namespace lol {
namespace cuda {

// A new token and a head.
struct Query {
  int token, head, map;  // map: which one of map_q
  int position, start;   // of the token; of its window
  float gate, den;
};

// What a block does for its sequence.
struct Sequence {
  int head, heads, kv_head;      // of the state; query heads that read it
  int64 batch, first_row, slot;  // where the new tokens and the state are
  int count, past, total;        // tokens: new, before, after
  int past_in_ring;              // where the first new token will be in the ring
  int begin, end, folded_after;  // positions that leave for the state in this call
  int sinks, first_key, keys;    // what some query attends by softmax: sinks, then the window
  int last_start;                // of the last query's window
};

static_assert(sizeof(Sequence) <= kSequenceBytes && sizeof(Query) <= kQueryBytes, "as planned");

struct ThreadOfBlock {
  int index;
  __device__ int lane() const { return index % 32; }
  __device__ int warp() const { return index / 32; }
};

// kQueries: at a time, and keys that leave at a time.
template <int kQueries>
class StepBlock {
 protected:
  __device__ StepBlock(const StepParams& params, unsigned char* shared_memory)
      : p(params), shared(shared_memory) {}

  // Anew in every function, so that no address is kept in registers meanwhile.
  static __device__ ThreadOfBlock this_thread() { return {ptx::thread_of_block()}; }

  // count = 0 where there is nothing to do.
  __device__ void find_sequence() {
    const int n = blockIdx.x / p.Hs;
    Sequence found = {};
    found.head = blockIdx.x % p.Hs;
    found.heads = p.H / p.Hs;
    found.kv_head = found.head / (p.Hs / p.Hk);
    found.batch = n;
    int64 count = p.T;
    if (p.cu_seqlens.data) {
      found.batch = 0;
      found.first_row = index_at(p.cu_seqlens, n);
      count = n < p.sequences ? index_at(p.cu_seqlens, n + 1) - found.first_row : 0;
    }
    if (count > 0) found.slot = p.state_indices.data ? index_at(p.state_indices, n) : n;
    if (count > 0 && found.slot >= 0 && found.slot < p.slots) {
      found.count = static_cast<int>(count);
      found.past = p.length[2 * found.slot];  // the upper word counts blocks
      found.total = found.past + found.count;
      found.past_in_ring = p.ring ? found.past % p.ring : 0;
      const int was = static_cast<int>(p.folded[found.slot]);
      // Keys are folded when the ring has no room for them, and then all that no query would need
      // after `slack` tokens were taken back.
      found.folded_after = found.total - was <= p.ring
                               ? was
                               : at_least(window_start(p, found.total - 1 - p.slack), was);
      found.begin = at_least(was, p.sink);
      found.end = at_least(found.folded_after, p.sink);
      found.sinks = at_most(p.sink, found.total);
      found.first_key = start_of(found.past);
      found.keys = found.sinks + at_least(found.total - found.first_key, 0);
      found.last_start = start_of(found.total - 1);
    }
    s() = found;
  }

  __device__ int start_of(int i) const { return at_least(window_start(p, i), p.sink); }

  // Of the keys that some query attends by softmax: sinks, then the window.
  __device__ int position_of(int key) const {
    return key < s().sinks ? key : s().first_key + key - s().sinks;
  }
  __device__ float* ksum_of_head() const { return p.ksum + (s().slot * p.Hs + s().head) * p.map.F; }
  __device__ float* kv_of_head() const {
    return p.kv + (s().slot * p.Hs + s().head) * p.map.F * p.V;
  }

  // pairs[r] = phi_q phi_k of the keys [first, last) of phi_k, and a thread's share of their sum;
  // by one warp.
  __device__ float weigh_pairs(int r, int first, int last) {
    const ThreadOfBlock me = this_thread();
    float of_key[kQueries] = {};
#pragma unroll 2
    for (int f = me.lane(); f < p.map.F; f += 32) {
      const float phi = phi_q()[f * kQueries + r];
#pragma unroll
      for (int j = 0; j < kQueries; j++)
        of_key[j] = fmaf(phi, phi_k()[f * kQueries + j], of_key[j]);
    }
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kQueries; j++) {
      const bool counts = j >= first && j < last;
      const float weight = warp_sum(of_key[j]);
      if (counts) sum += of_key[j];
      if (me.lane() == 0) pairs()[r * kQueries + j] = counts ? weight : 0.f;
    }
    return sum;
  }

  // Tells the other blocks of the sequence that this one has read all that it needs, and notes
  // whether they all have.
  __device__ void arrive() const {
    if (this_thread().index == 0)
      *is_last() =
          p.Hs == 1 || ptx::atomic_add_acq_rel(arrived(), 1) == static_cast<unsigned>(p.Hs - 1);
  }
  __device__ bool* is_last() const { return at<bool>(p.shared.pairs); }
  // How many blocks of the sequence have.
  __device__ unsigned* arrived() const {
    return reinterpret_cast<unsigned*>(p.length + 2 * s().slot + 1);
  }

  // ---- Shared memory. What all threads know is there as well: registers are for the state.

  template <class X>
  __device__ X* at(int offset) const {
    return reinterpret_cast<X*>(shared + offset);
  }
  __device__ Sequence& s() const { return *at<Sequence>(p.shared.sequence); }
  __device__ float* q() const { return at<float>(p.shared.q); }          // [kQueries x ld]
  __device__ float* x() const { return at<float>(p.shared.x); }          // [kQueries x ld]
  __device__ float* phi_q() const { return at<float>(p.shared.phi_q); }  // [F x kQueries]
  __device__ float* phi_k() const { return at<float>(p.shared.phi_k); }  // [F x kQueries]
  // [kQueries x kLanes]
  __device__ float4* leaving() const { return at<float4>(p.shared.leaving); }
  __device__ float* ksum() const { return at<float>(p.shared.ksum); }    // [F]
  __device__ float* pairs() const { return at<float>(p.shared.pairs); }  // [kQueries x kQueries]
  __device__ Query* queries() const { return at<Query>(p.shared.queries); }  // [kQueries]
  __device__ float* scores() const { return at<float>(p.shared.scores); }    // [kQueries x keys]
  // [kQueries x threads]
  __device__ float4* partial() const { return at<float4>(p.shared.partial); }
  __device__ float* z() const { return at<float>(p.shared.z); }  // [2 x kQueries x f]

  const StepParams& p;
  unsigned char* const shared;
};

}  // namespace cuda
}  // namespace lol
