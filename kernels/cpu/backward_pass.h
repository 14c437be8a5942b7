// What the two passes of backward.h share, and the passes: each takes a segment of one sequence and
// state head.
#pragma once
#include "backward.h"

namespace lol {
namespace LOL_ISA {

// A segment of one sequence and state head, and where its gradients go.
struct BackwardRun {
  const BackwardProblem& b;
  const Problem& p;
  const Sequence& s;
  const ParameterPartials& partials;
  int64_t state_head, slot;
  Segment segment;
  int64_t sinks = 0, first_key = 0, rows = 0;
  // [rows x padded(D | V)], the segment's part of the gradients of its keys, which the pass forward
  // in time begins; unless wants_inputs() is false
  float *dk = nullptr, *dv = nullptr;
  const float* delta = nullptr;  // dy . y [B, H, T]
  // The same, for the pass forward in time to compute; or null: it is given.
  float* new_delta = nullptr;

  bool wants_inputs() const { return b.dq.data != nullptr; }
  bool last() const { return segment.end == s.tokens; }
  int64_t row(int64_t position) const {
    return position < sinks ? position : sinks + position - first_key;
  }
  // Sets rows [begin, end) of both to zero.
  void clear_rows(int64_t begin, int64_t end) const {
    fill(dk + begin * padded(p.D()), (end - begin) * padded(p.D()), 0.0f);
    fill(dv + begin * padded(p.V()), (end - begin) * padded(p.V()), 0.0f);
  }
  float* dk_at(int64_t position) const { return dk + row(position) * padded(p.D()); }
  float* dv_at(int64_t position) const { return dv + row(position) * padded(p.V()); }
  Tokens keys() const { return tokens_of(p.k, s, p.kv_head_of(state_head)); }
  Tokens values() const { return tokens_of(p.v, s, p.kv_head_of(state_head)); }
  int64_t first_head() const { return state_head * p.group(); }
};

// A feature map in the problem's format, and its transposed weight.
struct BackwardMap {
  FeatureMap map;
  const float* weight_t;
  static int64_t floats(const Problem& p) {
    return p.paired_map_size() + transposed_weight_size(p.D(), p.f()) + 32;
  }
  static BackwardMap of(const Problem& p, const FeatureMap& map, Arena& arena);
};

// A block of queries of one head.
class QueryBlock {
 public:
  static int64_t floats(const Problem& p);
  // With `new_delta` delta is computed, not read.
  QueryBlock(const BackwardRun& run, float* new_delta, Arena& arena);
  void load(int64_t head, int64_t position);
  void prefetch(int64_t head, int64_t position) const;
  void store_delta();  // for the pass backward in time
  const BackwardMap& map() const { return maps_[h - run_.first_head()]; }

  int64_t h, first, n;
  float *q, *q_rows, *dy, *dy_rows;  // both ways
  float* phi;                        // [F x BLOCK], fp32
  float den[BLOCK];                  // 1 past n
  float by_den[BLOCK];               // 1 / den, with dy_factor; 0 past n
  float delta[BLOCK];                // dy . y

 private:
  const BackwardRun& run_;
  float* new_delta_;
  BackwardMap* maps_;  // of the heads of the group
  float* scratch_;
};

// Forward in time: dq, the softmax parts of dk and dv, dgate, and the parameters of phi_q. The
// state goes from `before` the segment to `after` it, where they are not null.
void backward_of_queries(const BackwardRun& run, StateSums before, StateSums after, Arena arena);
int64_t backward_of_queries_floats(const Problem& p);

// Backward in time: the linear parts of dk and dv, the parameters of phi_k. The gradient of the
// state goes from `after` the segment to `before` it.
void backward_of_keys(const BackwardRun& run, StateSums after, StateSums before, Arena arena);
// That gradient alone, after every segment but the last. `run` is the whole sequence.
void gradients_after(const BackwardRun& run, const Segments& segments, StateSums final_gradient,
                     const SegmentStates& to, Arena arena);
int64_t backward_of_keys_floats(const Problem& p);

}  // namespace LOL_ISA
}  // namespace lol
