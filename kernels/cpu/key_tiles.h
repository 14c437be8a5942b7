// The keys and values of an attention, a tile at a time, with their features.
#pragma once
#include "attention_problem.h"

namespace lol {
namespace LOL_ISA {

// A tile of up to BLOCK keys, loaded once and kept while neighbouring blocks use it. In pairs of
// bf16: [ceil(D / 2) x BLOCK], [BLOCK / 2 x padded(V)], and phi both as [ceil(F / 2) x BLOCK] and,
// behind it, as [F x BLOCK / 2].
struct KeyTile {
  int64_t start, n;
  bool sink;
  float* keys;  // [D x BLOCK]
  float* v;     // [BLOCK x padded(V)]
  float* phi;   // [F x BLOCK], computed on demand; without a map pairs along tokens alone
  bool has_phi;
  int64_t used;    // when, for replacing the tile used longest ago
  float* k_rows;   // [BLOCK x padded(D)] or pairs of keys, for the backward pass; else null
  float* v_lanes;  // pairs along V [ceil(V / 2) x BLOCK], for the backward pass by pairs; else null
};

constexpr int MOST_TILES = 16;

class KeyTiles {
 public:
  static int64_t floats(const Problem& p, int count);
  static int64_t tile_floats(const Problem& p);
  static KeyTile make_tile(const Problem& p, Arena& arena);
  static int for_window(const Problem& p);  // how many tiles serve its window
  // `total` keys exist; positions below k.past are in the ring or among the sinks.
  KeyTiles(const Problem& p, int count, const Tokens& k, const Tokens& v, const FeatureMap& map,
           int64_t total, Arena& arena);
  KeyTile& at(int64_t start) { return find(start, total_, false); }
  KeyTile& sinks_at(int64_t start) { return find(start, at_most(sinks_, total_), true); }
  const float* phi(KeyTile& tile);
  // phi as the left side of a sum over keys.
  Operand phi_by_keys(KeyTile& tile);
  // The values as the left side of a sum over V, of tiles both ways.
  Operand values(const KeyTile& tile) const;
  // Loads a tile of the caller's; and serves `count` such tiles, from key `first` on, instead of
  // loading them.
  void load(KeyTile& tile, int64_t start, int64_t end, bool sink = false);
  void hold(KeyTile* tiles, int64_t first, int64_t count) {
    held_ = tiles;
    first_held_ = first;
    held_count_ = count;
  }
  int64_t total() const { return total_; }
  Format format() const { return format_; }
  int count() const { return count_; }  // the last count() tiles asked for stay valid

 private:
  KeyTile& find(int64_t start, int64_t end, bool sink);

  Tokens k_, v_;
  FeatureMap map_;
  Format format_;
  int64_t total_, sinks_, clock_ = 0;
  int count_;
  KeyTile tiles_[MOST_TILES];
  KeyTile* held_ = nullptr;
  int64_t first_held_ = 0, held_count_ = 0;
  float *row_tile_, *phi_;
};

}  // namespace LOL_ISA
}  // namespace lol
