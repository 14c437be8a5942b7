// Keys and values of a head for a block of hybrid_attention_step_: where they are and will be
// remembered, and tiles of them in shared memory.
#pragma once
#include "step_block.cuh"

namespace lol {
namespace cuda {

template <class T, int kLanes, int kQueries, bool kWide>
class StepKeys : protected StepBlock<kQueries> {
  using Block = StepBlock<kQueries>;

 protected:
  static constexpr int kThreads = step_threads(kLanes, kQueries), kColumns = 4 * kLanes;
  using Block::p, Block::s, Block::this_thread, Block::position_of;

  __device__ StepKeys(const StepParams& params, unsigned char* shared_memory)
      : Block(params, shared_memory) {}

  // Keys or values of the head by position: new ones, and where they are remembered.
  struct KeyRows {
    const T *fresh, *sinks, *ring;
    int64 token;       // from one new row to the next
    int past, sink;    // first positions of new rows and of the ring
    int shift, slots;  // position + shift is a slot of the ring, modulo `slots`
    int width;

    __device__ const T* at(int position) const {
      if (position >= past) return fresh + (position - past) * token;
      if (position < sink) return sinks + static_cast<int64>(position) * width;
      const int slot = position + shift;
      return ring + static_cast<int64>(slot < 0 ? slot + slots : slot) * width;
    }
  };
  __device__ KeyRows rows_of_head(bool values) const {
    const Rows& x = values ? p.v : p.k;
    const int width = values ? p.V : p.map.D, past = s().past;
    const int64 store = (s().slot * p.Hk + s().kv_head) * width;
    return {row_of<T>(x, s().batch, s().kv_head, s().first_row),
            static_cast<const T*>(values ? p.v_sink : p.k_sink) + store * p.sink,
            static_cast<const T*>(values ? p.v_ring : p.k_ring) + store * p.ring,
            x.token,
            past,
            p.sink,
            s().past_in_ring - past,
            p.ring,
            width};
  }
  // A warp copies a row as floats, filled up with zeros to `columns` of them, a multiple of 8.
  __device__ void load_row(float* to, int columns, const T* row, int width) {
    const ThreadOfBlock me = this_thread();
    constexpr int per = kPerChunk<T>;
#pragma unroll 1
    for (int first = me.lane() * per; first < columns; first += 32 * per) {
      Chunk<T> chunk = {};
      if (first < width) chunk = load_chunk<T, kWide>(row, first, width);
      store_floats(to + first, chunk);
    }
  }

  // Starts copying keys [wanted, wanted + 1) * p.keys, unless they are there, and the slice of
  // their values.
  __device__ void copy_tile(int wanted) {
    const ThreadOfBlock me = this_thread();
    if (wanted == tile) return;
    tile = wanted;
    const bool with_keys = wanted != tile_of_keys;
    tile_of_keys = wanted;
    constexpr int per = kPerChunk<T>;
    const int key = tile * p.keys, rows = at_most(s().keys - key, p.keys);
    // A thread copies the same chunk of every key that it takes.
    const int of_key = (p.map.D + per - 1) / per, chunks = of_key + kColumns / per;
    const int across = 32 - __clz(chunks - 1), chunk = me.index & ((1 << across) - 1);
    const bool values = chunk >= of_key;
    if (chunk < chunks && (values || with_keys)) {
      const KeyRows from = rows_of_head(values);
      const int first = (values ? chunk - of_key : chunk) * per;
      const int begin = values ? column : 0, width = from.width - begin;
#pragma unroll 2
      for (int row = me.index >> across; row < rows; row += kThreads >> across) {
        T* to = values ? v_tile() + row * kColumns : k_tile(row);
        copy_chunk(to + first, from.at(position_of(key + row)) + begin, first, width);
      }
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

  // The new tokens of a key/value head, into ring and sinks.
  __device__ void remember(int of_head) {
    remember(p.k, p.k_ring, p.k_sink, p.map.D, of_head);
    remember(p.v, p.v_ring, p.v_sink, p.V, of_head);
  }
  __device__ void remember(const Rows& x, void* ring, void* sink, int width, int of_head) {
    const ThreadOfBlock me = this_thread();
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

  __device__ T* k_tile(int key) const {  // [keys x D]
    return this->template at<T>(p.shared.k + key * p.k_row);
  }
  __device__ T* v_tile() const { return this->template at<T>(p.shared.v); }  // [keys x kColumns]

  int column;              // the slice of V starts here
  int tile, tile_of_keys;  // in shared memory: values of this slice, keys
};

}  // namespace cuda
}  // namespace lol
