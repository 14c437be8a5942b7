// What a block of attention has in shared memory, and how it comes there.
#pragma once
#include "attention_block.cuh"
#include "tile_features.cuh"

namespace lol {
namespace cuda {

template <class Number, int kD, int kf, int kSides, int kV, int kChunk, int kSlots>
class AttentionMemory : protected AttentionBlock {
 protected:
  using T = Tiled<Number>;
  static constexpr AttentionTiles kTiles = {sizeof(T), kD, kf, kSides, kV, kChunk, kSlots};
  static constexpr int kWarps = kTiles.warps(), kF = kTiles.F();
  static constexpr int kHeaderBytes = kTiles.header_bytes(), kThreads = 32 * kWarps;
  static constexpr bool kSharesQueries = kTiles.shares_queries(), kHoldsMaps = kTiles.holds_maps(),
                        kHoldsSinks = kTiles.holds_sinks();
  static constexpr int kUnroll = kUnrollFor<T, kF>;
  static_assert(kV <= kD, "outputs pass through the tile of queries");
  static_assert(kHoldsSinks || kSinks * (kD + kV) <= kChunk * kF, "no place for sinks");
  static_assert(kTiles.shared_bytes() <= kAttentionShared, "");
  using MapWeight = Weight<T, kD, kf, kHoldsMaps>;

  __device__ __forceinline__ AttentionMemory(const AttentionParams& params, unsigned char* shared)
      : AttentionBlock(params, shared) {
    T* free = reinterpret_cast<T*>(shared + kHeaderBytes);
    q = take<kChunk, kD>(free);
    k = take<kSlots * kChunk, kD>(free);
    v = take<kSlots * kChunk, kV>(free);
    phi_k = take<kChunk, kF>(free);
    T* of_phi_k = phi_k.data;
    T*& sinks = kHoldsSinks ? free : of_phi_k;
    k_sink = take<kSinks, kD>(sinks);
    v_sink = take<kSinks, kV>(sinks);
    kv = take<kF, kV>(free);
    ksum = take<kF, 8>(free);
    if constexpr (kSharesQueries) phi_q = {take<kChunk, kF>(free), 16 * this_warp()};
    if constexpr (kHoldsMaps) {
      weight_q.tile = take<kD, kf>(free);
      weight_k.tile = take<kD, kf>(free);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++) held[slot] = -1;
  }

  // Whether the warp has queries: 16, of which nobody else knows.
  static __device__ __forceinline__ bool has_queries() {
    return kChunk == 16 * kWarps || this_warp() < kChunk / 16;
  }
  // Whether it makes features of keys: of 16 of a tile, from the first one on.
  static __device__ __forceinline__ int first_key() {
    return 16 * this_warp() - 16 * kWarps + kChunk;
  }
  static __device__ __forceinline__ bool has_key_features() {
    return kChunk == 16 * kWarps || first_key() >= 0;
  }
  __device__ __forceinline__ Tile<T, kD> own_queries() const { return q.rows(16 * this_warp()); }
  __device__ __forceinline__ Tile<T, kD> keys(int tile) const {
    return k.rows(tile % kSlots * kChunk);
  }
  __device__ __forceinline__ Tile<T, kV> values(int tile) const {
    return v.rows(tile % kSlots * kChunk);
  }
  __device__ __forceinline__ TileMap<MapWeight> query_map() const {
    return {weight_q, at.bias_q, p.map_q.weight != nullptr, p.f};
  }
  __device__ __forceinline__ TileMap<MapWeight> key_map() const {
    return {weight_k, at.bias_k, p.map_k.weight != nullptr, p.f};
  }

  __device__ __forceinline__ void load_maps() {
    load_map(weight_q, p.map_q);
    load_map(weight_k, p.map_k);
  }
  __device__ __forceinline__ void load_queries(int chunk) {
    const int position = chunk * kChunk + 16 * this_warp();
    if (has_queries())
      copy_rows(this_lane(), own_queries(), row_of<Number>(p.q, at.batch, at.head, 0), p.q.token,
                tokens_at(position), at.length - position, p.D, p.wide);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_tile(int tile) {
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++)
      held[slot] = tile % kSlots == slot ? tile : held[slot];
    load_keys<kChunk>(keys(tile), values(tile), tile * kChunk);
  }
  // Whether sinks, once loaded, are there for every chunk.
  __device__ __forceinline__ bool sinks_stay() const { return kHoldsSinks && p.sink <= kSinks; }
  __device__ __forceinline__ void load_sinks(int first) {
    load_keys<kSinks>(k_sink, v_sink, first);
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
    if (next % kSlots != tile % kSlots) load_ahead(next);
  }
  // Starts with a tile; no thread needs what its slot has.
  __device__ __forceinline__ void load_ahead(int tile) {
    if (tile < at.end && !holds(tile)) load_tile(tile);
  }

  Tile<T, kD> q, k, k_sink;
  Tile<T, kV> v, v_sink, kv;
  Tile<T, kF> phi_k;
  Tile<T, 8> ksum;
  LeftFeatures<T, kF, kSharesQueries> phi_q;

 private:
  template <int rows, int columns>
  static __device__ __forceinline__ Tile<T, columns> take(T*& free) {
    const Tile<T, columns> tile = {free};
    free += rows * columns;
    return tile;
  }
  __device__ __forceinline__ void load_map(MapWeight& to, const Maps& maps) {
    if (maps.weight)
      to.bring(maps.weight + static_cast<int64>(at.head / maps.group) * p.D * p.f, p.D, p.f,
               kThreads, projects_in_f16<T>(p.activation));
  }
  // A warp brings 16 of the kKeys keys from a position on.
  template <int kKeys>
  __device__ __forceinline__ void load_keys(const Tile<T, kD>& to_k, const Tile<T, kV>& to_v,
                                            int position) {
    const int lane = this_lane(), first = 16 * this_warp(), count = at.length - position - first;
    if (first < kKeys) {
      const Tokens tokens = tokens_at(position + first);
      copy_rows(lane, to_k.rows(first), row_of<Number>(p.k, at.batch, at.kv_head, 0), p.k.token,
                tokens, count, p.D, p.wide);
      copy_rows(lane, to_v.rows(first), row_of<Number>(p.v, at.batch, at.kv_head, 0) + at.column,
                p.v.token, tokens, count, p.V - at.column, p.wide);
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ bool holds(int tile) const {
    bool found = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; slot++) found |= held[slot] == tile;
    return found;
  }

  MapWeight weight_q, weight_k;
  int held[kSlots];  // the tiles of keys in shared memory
};

}  // namespace cuda
}  // namespace lol
