#include "partials.h"

namespace lol {
namespace LOL_ISA {

ParameterPartials::ParameterPartials(const Problem& p, const Batch& batch, const Segments& segments)
    : p_(p),
      sequences_(batch.count),
      groups_(groups_of(batch.count, p.state_heads())),
      weight_(has_map(p.feature_k) ? WeightGradient::floats(p.D(), p.feature_k.weight.shape[2])
                                   : 0),
      memory_(floats(batch, segments)) {
  q_ = memory_.data;
  k_ = q_ + slots() * p.heads() * weight_;
  gate_ = k_ + slots() * p.state_heads() * weight_;
  if (ok()) fill(memory_.data, gate_ + slots() * p.heads() - q_, 0.0f);
}

int64_t ParameterPartials::floats(const Batch& batch, const Segments& segments) {
  first_slot_[0] = 0;
  for (int64_t group = 0; group < groups_; group++) {
    int64_t most = 0;
    for (int64_t i = begin(group); i < end(group); i++)
      most = at_least(most, segments.count(batch.sequences[i]));
    first_slot_[group + 1] = first_slot_[group] + most;
  }
  return slots() * ((p_.heads() + p_.state_heads()) * weight_ + p_.heads());
}

int64_t ParameterPartials::group_of(int64_t slot) const {
  int64_t group = 0;
  while (first_slot_[group + 1] <= slot) group++;
  return group;
}

WeightGradient ParameterPartials::q(int64_t slot, int64_t h) const {
  return weight_ ? WeightGradient::at(q_ + (slot * p_.heads() + h) * weight_, p_.D(),
                                      p_.feature_q.weight.shape[2])
                 : WeightGradient{};
}
WeightGradient ParameterPartials::k(int64_t slot, int64_t state_head) const {
  return weight_ ? WeightGradient::at(k_ + (slot * p_.state_heads() + state_head) * weight_, p_.D(),
                                      p_.feature_k.weight.shape[2])
                 : WeightGradient{};
}

void ParameterPartials::reduce(const ParameterGradients& to) const {
  WeightGradient::reduce(q_, slots(), p_.heads(), p_.feature_q, p_.D(), to.dweight_q, to.dbias_q);
  WeightGradient::reduce(k_, slots(), p_.state_heads(), p_.feature_k, p_.D(), to.dweight_k,
                         to.dbias_k);
  for (int64_t h = 0; to.dgate && h < p_.heads(); h++) {
    to.dgate[h] = 0.0f;
    for (int64_t slot = 0; slot < slots(); slot++) to.dgate[h] += gate(slot, h);
  }
}

}  // namespace LOL_ISA
}  // namespace lol
