// The chunkwise backward shared by linear attention, hybrid attention and attention transfer.
//
// With delta_i = dy_i . y_i, the gradient of the unnormalised weight of key j in query i is dp_ij =
// (dy_i . v_j - delta_i) / den_i, so that
//
//   softmax keys: ds_ij = u_ij dp_ij, with u_ij = g e^{s_ij - m_i}; at the maximum less R_i =
//     sum_W u_ij dp_ij, shared by ties, since m_i moves and the linear part is not rescaled
//   linear keys: dphi_q,i = lambda sum_N dp_ij phi_k,j and dphi_k,j = lambda sum_i dp_ij phi_q,i
//   gate: the sum of R_i (1 - g), or of R_i when affine, since sum_W u_ij dp_ij +
//     lambda sum_N (phi_q,i . phi_k,j) dp_ij = 0
//
// A pass forward in time rebuilds the state (kv, ksum) and yields dq, the softmax parts of dk and
// dv, and dgate. A pass backward in time carries dkv = lambda sum_i phi_q,i (x) dy_i / den_i and
// dksum = -lambda sum_i delta_i phi_q,i / den_i over the queries later than the keys at hand, and
// yields the rest. Features and states are recomputed, never stored: memory O(T (D + V)).
//
// dy stays as it came, so that its products by pairs are exact: 1 / den goes into what they meet.
#pragma once
#include "partials.h"

namespace lol {
namespace LOL_ISA {

struct BackwardProblem {
  explicit BackwardProblem(const Problem& problem) : p(problem) {
    p.both_ways = true;
    p.weight_parts = weight_parts_for(p.feature_k.activation, true);
    if (!has_map(p.feature_k)) p.format = Format::f32;  // which features_forward() copies
  }
  Problem p;
  lol_tensor dy = {};            // [B, H, T, V]
  float dy_factor = 1.0f;        // multiplies dy
  lol_tensor y = {};             // the output, or absent: then
  const float* delta = nullptr;  // dy . y [B, H, T], to be multiplied by dy_factor as well
  const float* den = nullptr;    // [B, H, T]
  const float *kv0 = nullptr, *ksum0 = nullptr;  // initial state, or null
  const float *dkv = nullptr, *dksum = nullptr;  // gradient of the final state, or null
  lol_tensor dq = {}, dk = {}, dv = {};          // absent: not wanted (all three)
  ParameterGradients parameters = {};
  float *dkv0 = nullptr, *dksum0 = nullptr;

  // Whether delta comes from a y that was rounded to 16 bits. The pass forward in time, which finds
  // out by how much, then leaves the right one to the other.
  bool corrects_delta() const { return !delta && p.normalize && p.q.dtype != LOL_F32; }
};

int backward(const BackwardProblem& b, const Batch& batch);
// Without the final sums.
int backward(const BackwardProblem& b, const Batch& batch, const Segments& segments,
             const ParameterPartials& partials);

}  // namespace LOL_ISA
}  // namespace lol
