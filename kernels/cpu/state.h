// The recurrent state: sums over keys that every later query sees as linear.
#pragma once
#include "pairs.h"

namespace lol {
namespace LOL_ISA {

// The sums over the keys [sinks, folded).
struct State {
  float *kv, *ksum;  // [F x padded(V)], [F]; without meaning while `empty`
  float* readable;   // kv as products read it: in pairs, or itself
  int64_t folded;
  bool empty;

  static int64_t floats(int64_t F, int64_t V) { return F * padded(V) + F + 16; }
};
// What products sum over when they read kv, if any do, and so along what it is kept in pairs.
enum class Along { nothing, features, values };
// Rows [begin, end) of a state.
struct Features {
  int64_t begin, end;
};

// Some rows of a state: where they are, or are to go.
struct StateRows {
  float *kv, *ksum;
  float* pairs;  // kv as pairs, two rows after two, or null
};
// to = from, unless that is empty, + phi v and phi over the first n keys of a tile: phi has F rows,
// along keys, and v [BLOCK x ld], both in `format`. By pairs kv stays where it is.
void fold_tile(Format format, Operand phi, const float* v, int n, int F, int ld, Into into,
               StateRows from, StateRows to);

// to[BLOCK] += a[F] tile[F x BLOCK].
void add_products(Format format, float* to, const float* a, const float* tile, int F);

// to[i] += the sum of row i of tile[F x BLOCK], of floats or pairs, times weights[BLOCK].
void add_weighted_rows(Format format, float* to, const float* tile, const float* weights, int F);
// to[i] = from[i] + what a[F x ld] lacks in bf16, times b.
void add_what_rounding_took(float* to, const float* from, const float* a, const uint16_t* rounded,
                            const float* b, int F, int ld);

}  // namespace LOL_ISA
}  // namespace lol
