// Gradients of the feature maps and the gate: summed by workers, then added up.
#pragma once
#include "segments.h"

namespace lol {
namespace LOL_ISA {

struct ParameterGradients {
  lol_tensor dweight_q, dbias_q, dweight_k, dbias_k;
  float* dgate;  // [H], or null
};

// Sums of the parameters' gradients, by head and slot. Sequences come in groups, whose j-th
// segments share a slot; slots are added up in order, so the result does not depend on the number
// of threads.
class ParameterPartials {
 public:
  ParameterPartials(const Problem& p, const Batch& batch, const Segments& segments);
  bool ok() const { return memory_.ok(); }
  int64_t groups() const { return groups_; }
  int64_t begin(int64_t group) const { return sequences_ * group / groups_; }  // its sequences
  int64_t end(int64_t group) const { return begin(group + 1); }
  int64_t slots() const { return first_slot_[groups_]; }
  int64_t slot(int64_t group, int64_t segment) const { return first_slot_[group] + segment; }
  int64_t group_of(int64_t slot) const;
  // work(sequence, j) for the segments that share a slot, the j-th of their sequences.
  template <class Work>
  void each_segment(int64_t slot, const Batch& batch, const Segments& segments,
                    const Work& work) const {
    const int64_t group = group_of(slot), j = slot - first_slot_[group];
    for (int64_t i = begin(group); i < end(group); i++)
      if (j < segments.count(batch.sequences[i])) work(batch.sequences[i], j);
  }
  WeightGradient q(int64_t slot, int64_t h) const;
  WeightGradient k(int64_t slot, int64_t state_head) const;
  float& gate(int64_t slot, int64_t h) const { return gate_[slot * p_.heads() + h]; }
  void reduce(const ParameterGradients& to) const;

 private:
  // Of all slots, whose first are found on the way.
  int64_t floats(const Batch& batch, const Segments& segments);

  const Problem& p_;
  int64_t sequences_, groups_, weight_;
  int64_t first_slot_[MOST_GROUPS + 1];
  Buffer memory_;
  float *q_, *k_, *gate_;
};

}  // namespace LOL_ISA
}  // namespace lol
