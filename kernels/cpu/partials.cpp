#include "partials.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Partial sums per state head are cheap to add up and expensive to hold (D f floats per head), so
// sequences share them in groups; 64 workers are enough for any CPU.
constexpr int64_t WORKERS = 64;

}  // namespace

ParameterPartials::ParameterPartials(const Problem& p, const Batch& batch)
    : p_(p),
      sequences_(batch.count),
      groups_(at_most(batch.count, at_least(WORKERS / p.state_heads(), 1))),
      weight_(has_map(p.feature_k) ? WeightGradient::floats(p.D(), p.feature_k.weight.shape[2])
                                   : 0),
      memory_(groups_ * ((p.heads() + p.state_heads()) * weight_ + p.heads())) {
  q_ = memory_.data;
  k_ = q_ + groups_ * p.heads() * weight_;
  gate_ = k_ + groups_ * p.state_heads() * weight_;
  if (ok()) fill(memory_.data, gate_ + groups_ * p.heads() - q_, 0.0f);
}

WeightGradient ParameterPartials::q(int64_t worker, int64_t h) const {
  const int64_t group = worker / p_.state_heads();
  return weight_ ? WeightGradient::at(q_ + (group * p_.heads() + h) * weight_, p_.D(),
                                      p_.feature_q.weight.shape[2])
                 : WeightGradient{};
}
WeightGradient ParameterPartials::k(int64_t worker) const {
  return weight_ ? WeightGradient::at(k_ + worker * weight_, p_.D(), p_.feature_k.weight.shape[2])
                 : WeightGradient{};
}
float& ParameterPartials::gate(int64_t worker, int64_t h) const {
  return gate_[worker / p_.state_heads() * p_.heads() + h];
}

void ParameterPartials::reduce(const ParameterGradients& to) const {
  WeightGradient::reduce(q_, groups_, p_.heads(), p_.feature_q, p_.D(), to.dweight_q, to.dbias_q);
  WeightGradient::reduce(k_, groups_, p_.state_heads(), p_.feature_k, p_.D(), to.dweight_k,
                         to.dbias_k);
  for (int64_t h = 0; to.dgate && h < p_.heads(); h++) {
    to.dgate[h] = 0.0f;
    for (int64_t group = 0; group < groups_; group++) to.dgate[h] += gate_[group * p_.heads() + h];
  }
}

}  // namespace LOL_ISA
}  // namespace lol
