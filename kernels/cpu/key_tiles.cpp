#include "key_tiles.h"

namespace lol {
namespace LOL_ISA {

// The tiles of a window, one more for the tile being folded and those of the sinks. Past
// MOST_TILES, wide windows load tiles again: a load costs a few per cent of the products of a tile
// pair, while more tiles would push the state out of L2.
int KeyTiles::for_window(const Problem& p) {
  const int64_t span = window_span(p.window.size, p.window.kind) + BLOCK - 1;
  return (int)at_most(span / BLOCK + 2 + (p.window.sink + BLOCK - 1) / BLOCK, MOST_TILES);
}

int64_t KeyTiles::floats(const Problem& p, int count) {
  return count * tile_floats(p) + at_least(rows_size(p.D()), rows_size(p.V())) +
         lanes_size(p.F() + 1) + p.paired_map_size() + LANES;
}

int64_t KeyTiles::tile_floats(const Problem& p) {
  return lanes_size(p.D()) + rows_size(p.V()) + lanes_size(p.F() + 1) +
         (p.both_ways ? rows_size(p.D()) + lanes_size(p.V()) : 0);
}

KeyTile KeyTiles::make_tile(const Problem& p, Arena& arena) {
  KeyTile tile = {};
  tile.start = -1;
  tile.keys = arena.take(lanes_size(p.D()));
  tile.v = arena.take(rows_size(p.V()));
  tile.phi = arena.take(lanes_size(p.F() + 1));
  if (p.both_ways) tile.k_rows = arena.take(rows_size(p.D()));
  if (p.both_ways && p.format != Format::f32) tile.v_lanes = arena.take(lanes_size(p.V()));
  return tile;
}

KeyTiles::KeyTiles(const Problem& p, int count, const Tokens& k, const Tokens& v,
                   const FeatureMap& map, int64_t total, Arena& arena)
    : k_(k),
      v_(v),
      map_(p.in_format(map, arena)),
      format_(p.format),
      total_(total),
      sinks_(p.window.sink),
      count_(count) {
  for (int i = 0; i < count_; i++) tiles_[i] = make_tile(p, arena);
  row_tile_ = arena.take(at_least(rows_size(p.D()), rows_size(p.V())));
  if (format_ != Format::f32) phi_ = arena.take(lanes_size(p.F() + 1));
}

KeyTile& KeyTiles::find(int64_t start, int64_t end, bool sink) {
  const int64_t past_first = start - first_held_;
  if (!sink && past_first >= 0 && past_first % BLOCK == 0 && past_first / BLOCK < held_count_)
    return held_[past_first / BLOCK];
  int slot = 0;
  clock_++;
  for (int i = 0; i < count_; i++) {
    KeyTile& tile = tiles_[i];
    if (tile.start == start && tile.sink == sink) {
      tile.used = clock_;
      return tile;
    }
    if (tile.used < tiles_[slot].used) slot = i;
  }
  KeyTile& tile = tiles_[slot];
  load(tile, start, end, sink);
  tile.used = clock_;
  return tile;
}

void KeyTiles::load(KeyTile& tile, int64_t start, int64_t end, bool sink) {
  tile.start = start;
  tile.n = at_most(BLOCK, end - start);
  tile.sink = sink;
  tile.has_phi = false;
  load_values(tile.v, v_, start, tile.n, format_, sink);
  if (!tile.k_rows) {
    load_lanes(tile.keys, k_, start, tile.n, format_, row_tile_, sink);
  } else {
    load_both_ways(tile.keys, tile.k_rows, k_, start, tile.n, format_, row_tile_, sink);
    if (tile.v_lanes) load_lanes(tile.v_lanes, v_, start, tile.n, format_, row_tile_, sink);
  }
  if (sink) return;  // hardly ever more than one tile
  const int64_t ahead = at_most(BLOCK, end - start - tile.n);
  request_rows(k_, start + tile.n, ahead);
  request_rows(v_, start + tile.n, ahead);
}

const float* KeyTiles::phi(KeyTile& tile) {
  if (!map_.weight) return tile.keys;
  if (tile.has_phi) return tile.phi;
  tile.has_phi = true;
  if (format_ == Format::f32) {
    features_forward(map_, tile.keys, tile.phi);
  } else {
    float* along_tokens = tile.phi + words(format_, map_.F) * BLOCK;
    features_in_pairs(map_, tile.keys, 1.0f, phi_, {tile.phi, along_tokens});
  }
  return tile.phi;
}

Operand KeyTiles::phi_by_keys(KeyTile& tile) {
  const float* of = phi(tile);
  if (format_ == Format::f32) return rows(of, BLOCK);
  if (map_.weight) return rows(of + words(format_, map_.F) * BLOCK, BLOCK / 2);
  if (!tile.has_phi) columns_of_rows(tile.phi, of, map_.D);
  tile.has_phi = true;
  return rows(tile.phi, BLOCK / 2);
}

Operand KeyTiles::values(const KeyTile& tile) const {
  return tile.v_lanes ? transposed(tile.v_lanes, BLOCK) : rows(tile.v, padded(v_.width));
}

}  // namespace LOL_ISA
}  // namespace lol
