// What a block of queries sums up over the keys that it weighs pair by pair, and a state.
#pragma once
#include "key_tiles.h"

namespace lol {
namespace LOL_ISA {

// A block of queries of one head.
struct Queries {
  int64_t first, n;
  const float *q, *phi;  // [D x BLOCK], [F x BLOCK], or pairs along the first dimension
};

// The keys from position `from` on that a block sees, newest first, and before them the sinks; in
// pieces of as many tiles as stay loaded.
struct WeightTile {
  KeyTile* tile;
  Band softmax, linear;  // who sees a key how
  float* weights;        // [n x BLOCK]
};
class Pieces {
 public:
  Pieces(KeyTiles& tiles, const Window& window, const Queries& block, int64_t from);
  bool more() const { return sink_ < sinks_ || position_ >= from_; }
  // Fills `piece` with the next tiles, q . k of their softmax keys in `weights` [MOST_TILES * BLOCK
  // x BLOCK]; returns how many, or 0.
  int next(WeightTile* piece, float* weights, int D);
  void restart();

 private:
  KeyTiles& tiles_;
  const Starts starts_;
  const Queries& block_;
  int64_t sink_, sinks_, from_, position_;
};

// What a block of queries gathers from its keys: y = sum a v and den = sum a over unnormalised
// weights a, and the maximum m of the scores (-inf: no softmax key).
struct Sums {
  float* y;  // [BLOCK x padded(V)]
  float m[BLOCK], den[BLOCK];
};
// Sums over the keys of Pieces(tiles, window, block, from): softmax weights are g e^{s - m}, linear
// ones phi_k phi_q. `state`, if not null, is one more product that y takes in; its share of den is
// the caller's. Rows of y past the block's are left alone. `weights` is scratch of WEIGHTS floats.
constexpr int WEIGHTS = (MOST_TILES + 1) * BLOCK * BLOCK;
void gather(KeyTiles& tiles, const Window& window, const Queries& block, int64_t from,
            const Problem& p, float g, float* weights, const Term* state, Sums& out);
// factor * y / den, rows [0, n).
void normalize(Sums& sums, int64_t n, int V, float factor = 1.0f);

}  // namespace LOL_ISA
}  // namespace lol
