// What an op file gets besides the arguments of the C ABI: plain structs, filled by
// kernels/api.cpp, read by every ISA.
#pragma once
#include "lolcats_ops/lolcats_ops.h"

namespace lol {

// One sequence of a batch: its real tokens, positions 0 .. tokens-1, are the rows first .. of batch
// entry `batch`, or, where padding leaves holes, the rows index[0..].
struct Sequence {
  int64_t batch;
  int64_t tokens;
  int64_t first;
  const int32_t* index;
  int64_t slot;  // of the state pool, and of initial and final states

  int64_t row(int64_t position) const { return index ? index[position] : first + position; }
};

struct Batch {
  const Sequence* sequences;
  int64_t count;
  int64_t real_tokens;  // over all sequences
  bool padded;          // some rows belong to no sequence: outputs must be cleared first
};

// One table per instruction set.
struct Kernels {
  const char* isa;
  int (*feature_map)(const lol_feature_map_args&);
  int (*feature_map_backward)(const lol_feature_map_backward_args&);
  int (*linear_attention)(const lol_linear_attention_args&, const Batch&);
  int (*linear_attention_backward)(const lol_linear_attention_backward_args&, const Batch&);
  int (*hybrid_attention)(const lol_hybrid_attention_args&, const Batch&);
  int (*hybrid_attention_backward)(const lol_hybrid_attention_backward_args&, const Batch&);
  int (*hybrid_attention_step)(const lol_hybrid_attention_step_args&, const Batch&);
  int (*attention_transfer)(const lol_attention_transfer_args&, const Batch&);
  int (*attention_transfer_backward)(const lol_attention_transfer_backward_args&, const Batch&);
};

// OpenMP's threads do not come along into a process that is forked, where it would wait for them
// for ever: once some have been at work, a child computes on one, to the same bits.
bool may_use_threads();

// Of the instruction set in use; null if LOLCATS_ISA names one that cannot run here.
const Kernels* cpu_kernels();
const char* isa_names();  // of those that can, best first

}  // namespace lol
