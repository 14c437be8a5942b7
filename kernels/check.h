// Validates what callers of the C ABI pass, so that no kernel reads or writes out of bounds. Each
// check returns LOL_OK, or sets lol_last_error() to "op: argument is value, needs ..." and returns
// LOL_EINVAL, or LOL_EUNSUPPORTED where no kernel of the device runs the operator.
#pragma once
#include "lolcats_ops/lolcats_ops.h"

namespace lol {

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int fail(const char* format, ...);
const char* last_error();

int check(const lol_feature_map_args& a);
int check(const lol_feature_map_backward_args& a);
int check(const lol_linear_attention_args& a);
int check(const lol_linear_attention_backward_args& a);
int check(const lol_hybrid_attention_args& a);
int check(const lol_hybrid_attention_backward_args& a);
int check(const lol_hybrid_attention_step_args& a);
int check(const lol_attention_transfer_args& a);
int check(const lol_attention_transfer_backward_args& a);

}  // namespace lol
