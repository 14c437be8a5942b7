// The cross-entropy of attention transfer (SPEC 7), which compares the weights of every pair of a
// query and a key.
#pragma once
#include "partials.h"

namespace lol {
namespace LOL_ISA {

// The teacher walks all earlier keys; eight tiles at a time keep its scores (32 KiB) in L2 beside
// the student's state.
constexpr int TEACHER_TILES = 8;

// Teacher's and student's normalised weights of one tile of keys, and which keys the student sees
// as linear.
struct TileWeights {
  float *teacher, *student;  // [BLOCK x BLOCK], zero above the diagonal
  Band causal, linear;
};

class AttentionWeights {
 public:
  static int64_t floats(const Problem& p) {
    return KeyTiles::floats(p, TEACHER_TILES) + 2 * BLOCK * BLOCK;
  }
  AttentionWeights(const Problem& p, int64_t state_head, const Sequence& s, Arena& arena)
      : tiles(p, TEACHER_TILES, tokens_of(p.k, s, p.kv_head_of(state_head)),
              tokens_of(p.v, s, p.kv_head_of(state_head)), p.map_k(state_head), s.tokens, arena),
        p_(p) {
    w.teacher = arena.take(BLOCK * BLOCK);
    w.student = arena.take(BLOCK * BLOCK);
  }

  // phi of the block times `lambda` are the linear weights.
  KeyTile& weigh(int64_t start, const Queries& block, int64_t h, float lambda, const float* m,
                 const float* den, const float* lse) {
    KeyTile& tile = tiles.at(start);
    const Starts starts(p_.window, block.first, block.n);
    w.causal = causal_band(starts, start, tile.n);
    w.linear = linear_band(starts, start, tile.n, p_.window.sink);
    gemm((int)tile.n, BLOCK, (int)p_.D(), transposed(tile.keys, BLOCK), block.q, BLOCK, w.teacher,
         BLOCK, Into::set);
    gemm((int)tile.n, BLOCK, (int)p_.F(), transposed(tiles.phi(tile), BLOCK), block.phi, BLOCK,
         w.student, BLOCK, Into::set, Skip::outputs, &w.linear);
    const float g = p_.g(h);
    for (int j = 0; j < tile.n; j++) {
      for (int c = 0; c < BLOCK; c += LANES) {
        const int at = j * BLOCK + c;
        const VecI seen = in_band(w.causal, c, j);
        const Vec s = rounded(p_.scale * load(w.teacher + at));
        const Vec unnormalised = select(in_band(w.linear, c, j), lambda * load(w.student + at),
                                        g * exp_below_one(s - load(m + c)));
        store(w.student + at, select(seen, unnormalised / load(den + c), Vec{}));
        store(w.teacher + at, select(seen, exp_below_one(s - load(lse + c)), Vec{}));
      }
    }
    return tile;
  }

  KeyTiles tiles;
  TileWeights w;

 private:
  const Problem& p_;
};

// - sum_j a*_ij log max(a_ij, 1e-12), summed over the queries of the block, loaded with lambda as
// their factor.
double cross_entropy(AttentionWeights& weights, const Queries& block, int64_t h, const float* m,
                     const float* den, const float* lse);

// Adds the gradients of factor * cross_entropy, summed over all queries, to `partials`.
int cross_entropy_backward(const lol_attention_transfer_args& a, const Problem& p,
                           const Batch& batch, const Segments& segments, float factor,
                           const ParameterPartials& partials);

}  // namespace LOL_ISA
}  // namespace lol
