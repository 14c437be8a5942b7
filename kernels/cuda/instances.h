// All kernels that there are, for whoever names, compiles or launches them; by lol_dtype.
//
// feature_map<number type, wide>
//
// hybrid_attention_step<number type, lanes, rows of a thread, queries at a time, wide>: the threads
// of a block are groups of `lanes`, which hold 4 x lanes of the state's V columns at a time; a
// group has `rows` of its F rows.
//
// One query at a time is for the step of decoding: one token, a state of its own for every query
// head, one key that leaves. A block has 8 groups, 16 rows of a thread are F = 128: 16 loads of 16
// bytes in flight, in 64 registers. A multiprocessor has room for two such blocks, of V = 64 for
// four, which wait for memory and at barriers at different times. Larger F takes more rows, in
// slices of V = 64.
//
// For several queries a block has 16 groups. 32 lanes with more than 8 rows would spill.
//
// wide: rows start at multiples of 16 bytes and are as long. The others are right, not fast.
#pragma once

#define LOL_FEATURE_MAP_INSTANCES_OF(X, T) \
  X(T, true)                               \
  X(T, false)

#define LOL_STEP_INSTANCES_OF(X, T) \
  X(T, 16, 16, 1, true)             \
  X(T, 32, 16, 1, true)             \
  X(T, 16, 32, 1, true)             \
  X(T, 16, 8, 4, true)              \
  X(T, 32, 8, 4, true)              \
  X(T, 16, 16, 4, true)             \
  X(T, 16, 32, 4, true)             \
  X(T, 16, 32, 4, false)

#define LOL_FEATURE_MAP_INSTANCES_f32(X) LOL_FEATURE_MAP_INSTANCES_OF(X, float)
#define LOL_FEATURE_MAP_INSTANCES_bf16(X) LOL_FEATURE_MAP_INSTANCES_OF(X, lol::bf16)
#define LOL_FEATURE_MAP_INSTANCES_f16(X) LOL_FEATURE_MAP_INSTANCES_OF(X, lol::f16)
#define LOL_STEP_INSTANCES_f32(X) LOL_STEP_INSTANCES_OF(X, float)
#define LOL_STEP_INSTANCES_bf16(X) LOL_STEP_INSTANCES_OF(X, lol::bf16)
#define LOL_STEP_INSTANCES_f16(X) LOL_STEP_INSTANCES_OF(X, lol::f16)

#define LOL_FEATURE_MAP_INSTANCES(X)                                 \
  LOL_FEATURE_MAP_INSTANCES_f32(X) LOL_FEATURE_MAP_INSTANCES_bf16(X) \
      LOL_FEATURE_MAP_INSTANCES_f16(X)
#define LOL_STEP_INSTANCES(X) \
  LOL_STEP_INSTANCES_f32(X) LOL_STEP_INSTANCES_bf16(X) LOL_STEP_INSTANCES_f16(X)
