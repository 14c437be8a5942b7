// The chunkwise algorithm shared by linear attention, hybrid attention and attention transfer:
// forward.
//
// One worker, or a team of threads (forward.h), handles one recurrent state: a sequence and a state
// head, with the 1 or G query heads that read it. Queries go in blocks of BLOCK. For the block at
// i0, with e0 = window.start(i0):
//   keys j < e0 are in the state (kv, ksum);
//   keys in [e0, i] and the sinks are weighed pair by pair: softmax from start(i) on, features
//   before it. Both weights of a tile of keys share one product with the values.
// Tiles go from the newest keys to the oldest, sinks first: a query meets all its softmax keys
// before the first linear one, so its maximum is final when the linear part, which is not rescaled,
// joins the same sums. Then the state absorbs what the next block calls old. Useful FLOPs per token
// and head: 2 D f (twice), 2 F V (read and write of the state), 2 w (D + V); nothing of size T x T
// or T x F exists.
#pragma once
#include "gather.h"
#include "state.h"

namespace lol {
namespace LOL_ISA {

class Chunkwise {
 public:
  static int64_t floats(const Problem& p);
  // The state starts empty, or with what load_state gives it. attend() reads it along features.
  Chunkwise(const Problem& p, int64_t state_head, int64_t total, const Tokens& k, const Tokens& v,
            Arena& arena, Along along = Along::features);
  void load_state(const float* kv, const float* ksum, int64_t folded);
  void store_state(float* kv, float* ksum, Features part) const;
  // Takes the keys before `end`, if there are any, into rows of the state, and these to another
  // place, or keeps them where they are.
  void fold(int64_t end, Features part, const State& to);
  void fold(int64_t end) { fold(end, {0, p_.F()}, state); }
  void keep_readable(Features part);  // after these rows of kv have changed
  // Along values, `readable` holds kv - ksum (x) center: gradients are differences of kv and ksum,
  // in which rounding would lose what all values have in common. Null where kv is held as it is.
  const float* center() const { return center_; }
  const FeatureMap& map_q(int64_t h) const { return maps_q_[h - state_head_ * p_.group()]; }
  // q and factor * phi_q; where q are the features, attend() multiplies.
  Queries load_queries(int64_t h, int64_t first, int64_t n, const Tokens& q, float factor = 1.0f);
  // The outputs y of queries loaded with lambda as their factor, and their m and den.
  Sums& attend(const Queries& block, int64_t h);

  KeyTiles tiles;
  State state;
  float* scores;    // WEIGHTS floats, scratch
  float* row_tile;  // [BLOCK x padded(max(D, V))], scratch

 private:
  const Problem& p_;
  int64_t state_head_;
  float *q_, *phi_;
  Sums sums_;
  FeatureMap* maps_q_;  // of this state's query heads, in the problem's format
  Along along_;         // the dimension that pairs of kv lie along

  void find_center();
  float* center_ = nullptr;  // whose product with ksum is nearest to kv: a mean of its values
  float* row_;               // [padded(V)]
  int64_t folds_ = 0;
};

}  // namespace LOL_ISA
}  // namespace lol
