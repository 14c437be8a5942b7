// All kernels that there are, for whoever names, compiles or launches them; by lol_dtype.
//
// feature_map<number type, wide>
//
// hybrid_attention_step<number type, lanes, rows of a thread, wide>: a block has 16 x lanes
// threads, holds 16 x rows of the state's F rows and 4 x lanes of its V columns at a time.
//   rows   8: eight loads of 16 bytes in flight per thread, 32 registers. 16 and 32 where F needs
//   them. lanes 16: F x 64 numbers; with 8 rows two blocks share a multiprocessor. lanes 32: all of
//   V = 128 in one block, so that keys and weights are read once. 32 x 32 would need more registers
//   than there are: wider values are walked in slices of 64.
// wide: rows start at and are multiples of 16 bytes. The others are right, not fast.
#pragma once

#define LOL_FEATURE_MAP_INSTANCES(X) \
  X(float, true)                     \
  X(float, false)                    \
  X(lol::bf16, true)                 \
  X(lol::bf16, false)                \
  X(lol::f16, true)                  \
  X(lol::f16, false)

#define LOL_STEP_INSTANCES_OF(X, T) \
  X(T, 16, 8, true)                 \
  X(T, 32, 8, true)                 \
  X(T, 16, 16, true)                \
  X(T, 16, 32, true)                \
  X(T, 16, 32, false)

#define LOL_STEP_INSTANCES(X)         \
  LOL_STEP_INSTANCES_OF(X, float)     \
  LOL_STEP_INSTANCES_OF(X, lol::bf16) \
  LOL_STEP_INSTANCES_OF(X, lol::f16)
