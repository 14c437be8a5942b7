// Gradients of the feature maps and the gate: summed by workers, then added up.
#pragma once
#include "chunkwise.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {

struct ParameterGradients {
  lol_tensor dweight_q, dbias_q, dweight_k, dbias_k;
  float* dgate;  // [H], or null
};

// Sums of the parameters' gradients, one slot for each (group of sequences, head), added up in
// order: the result does not depend on the number of threads.
class ParameterPartials {
 public:
  ParameterPartials(const Problem& p, const Batch& batch);
  bool ok() const { return memory_.ok(); }
  int64_t workers() const { return groups_ * p_.state_heads(); }
  // The sequences [begin, end) and the state head of a worker.
  int64_t state_head(int64_t worker) const { return worker % p_.state_heads(); }
  int64_t begin(int64_t worker) const { return sequences_ * (worker / p_.state_heads()) / groups_; }
  int64_t end(int64_t worker) const {
    return sequences_ * (worker / p_.state_heads() + 1) / groups_;
  }
  WeightGradient q(int64_t worker, int64_t h) const;
  WeightGradient k(int64_t worker) const;
  float& gate(int64_t worker, int64_t h) const;
  void reduce(const ParameterGradients& to) const;

 private:
  const Problem& p_;
  int64_t sequences_, groups_, weight_;
  Buffer memory_;
  float *q_, *k_, *gate_;
};

}  // namespace LOL_ISA
}  // namespace lol
