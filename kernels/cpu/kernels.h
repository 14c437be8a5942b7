// The entry points of one instruction set, as its table lists them. Arguments have been checked;
// sequences are laid out.
#pragma once
#include "call.h"

namespace lol {
namespace LOL_ISA {

int feature_map(const lol_feature_map_args&);
int feature_map_backward(const lol_feature_map_backward_args&);
int linear_attention(const lol_linear_attention_args&, const Batch&);
int linear_attention_backward(const lol_linear_attention_backward_args&, const Batch&);
int hybrid_attention(const lol_hybrid_attention_args&, const Batch&);
int hybrid_attention_backward(const lol_hybrid_attention_backward_args&, const Batch&);
int hybrid_attention_step(const lol_hybrid_attention_step_args&, const Batch&);
int attention_transfer(const lol_attention_transfer_args&, const Batch&);
int attention_transfer_backward(const lol_attention_transfer_backward_args&, const Batch&);

}  // namespace LOL_ISA
}  // namespace lol
