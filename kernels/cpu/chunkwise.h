// The chunkwise algorithm shared by linear attention, hybrid attention and attention transfer:
// forward.
//
// One worker handles one recurrent state: a sequence and a state head, with the 1 or G query heads
// that read it. Queries go in blocks of BLOCK. For the block at i0, with e0 = window.start(i0):
//   keys j < e0 are in the state (kv, ksum);
//   keys in [e0, i] and the sinks are weighed pair by pair: softmax from start(i) on, features
//   before it. Both weights of a tile of keys share one product with the values.
// Tiles go from the newest keys to the oldest, sinks first: a query meets all its softmax keys
// before the first linear one, so its maximum is final when the linear part, which is not rescaled,
// joins the same sums. Then the state absorbs what the next block calls old. Useful FLOPs per token
// and head: 2 D f (twice), 2 F V (read and write of the state), 2 w (D + V); nothing of size T x T
// or T x F exists.
#pragma once
#include "features.h"
#include "state.h"
#include "window.h"

namespace lol {
namespace LOL_ISA {

// One attention call, as every op describes it.
struct Problem {
  lol_tensor q, k, v;
  lol_features feature_q, feature_k;
  const float* gate;  // [H]; null in linear attention: no softmax part
  Window window;
  float scale;
  bool affine, normalize;
  float eps;                    // added to den
  Format format = Format::f32;  // of tiles
  int weight_parts = 1;         // of maps
  bool both_ways = false;       // tiles have their keys as rows and can be summed over V as well

  // Products of bf16 by pairs, where the instruction set has them.
  Problem by_pairs() const {
    Problem p = *this;
    if (q.dtype == LOL_BF16 && takes_pairs(feature_k)) p.format = Format::bf16_pairs;
    p.weight_parts = weight_parts_for(feature_k.activation, false);
    return p;
  }

  int64_t heads() const { return q.shape[1]; }
  int64_t kv_heads() const { return k.shape[1]; }
  int64_t state_heads() const {
    return has_map(feature_k) ? feature_k.weight.shape[0] : kv_heads();
  }
  int64_t group() const { return heads() / state_heads(); }  // query heads per state
  int64_t kv_head_of(int64_t state_head) const { return state_head / (state_heads() / kv_heads()); }
  int64_t D() const { return q.shape[3]; }
  int64_t V() const { return v.shape[3]; }
  int64_t F() const { return feature_dim(feature_k, D()); }
  int64_t f() const { return has_map(feature_k) ? feature_k.weight.shape[2] : 0; }
  int64_t paired_map_size() const {
    return format == Format::f32 ? 0 : weight_parts * paired_weight_size(D(), f());
  }
  FeatureMap map_q(int64_t h) const { return map_of(feature_q, h, heads(), D()); }
  FeatureMap map_k(int64_t state_head) const {
    return map_of(feature_k, state_head, state_heads(), D());
  }
  // Multiply-adds of the forward pass over all heads, for sharing it among threads.
  int64_t work(int64_t tokens) const {
    const int64_t span = 2 * (window.size + window.sink);
    const int64_t keys = gate ? at_most(span, tokens + span / 2) : 0;
    return heads() * tokens * (F() * (D() + 2 * V()) + keys * (D() + V()) / 2);
  }
  // Weights of the softmax and of the linear part.
  // A gate counts as -80 at least, and for lambda as 80 at most, lest a query with one kind of keys
  // alone divide zero by zero.
  float g(int64_t h) const {
    return gate ? 1.0f / (1.0f + expf(gate[h] < -80.0f ? 80.0f : -gate[h])) : 0.0f;
  }
  float lambda(int64_t h) const {
    if (!gate) return scale;
    return affine && window.any() ? 1.0f / (1.0f + expf(gate[h] > 80.0f ? 80.0f : gate[h])) : 1.0f;
  }
};

Problem problem_of(const lol_hybrid_attention_args& args);
Problem problem_of(const lol_linear_attention_args& args);

// A tile of up to BLOCK keys, loaded once and kept while neighbouring blocks use it. In pairs of
// bf16: [ceil(D / 2) x BLOCK], [BLOCK / 2 x padded(V)], and phi both as [ceil(F / 2) x BLOCK] and,
// behind it, as [F x BLOCK / 2].
struct KeyTile {
  int64_t start, n;
  bool sink;
  float* keys;  // [D x BLOCK]
  float* v;     // [BLOCK x padded(V)]
  float* phi;   // [F x BLOCK], computed on demand
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
// y / den, rows [0, n).
void normalize(Sums& sums, int64_t n, int V);

class Chunkwise {
 public:
  static int64_t floats(const Problem& p);
  // The state starts empty, or with what load_state gives it. attend() reads it along features.
  Chunkwise(const Problem& p, int64_t state_head, int64_t total, const Tokens& k, const Tokens& v,
            Arena& arena, Along along = Along::features);
  void load_state(const float* kv, const float* ksum, int64_t folded);
  void store_state(float* kv, float* ksum, Features part) const;
  void fold(int64_t end, Features part);  // takes the keys before `end` into the state
  void fold(int64_t end) { fold(end, {0, p_.F()}); }
  void keep_readable(Features part);  // after these rows of kv have changed
  FeatureMap map_q(int64_t h) const;  // in the problem's format
  // q and factor * phi_q.
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
  float* weights_q_;  // pairs of the maps of this state's query heads
  Along along_;       // what its pairs are kept
};

}  // namespace LOL_ISA
}  // namespace lol
