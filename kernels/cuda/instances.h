// All kernels that there are, for whoever names, compiles or launches them; by lol_dtype.
//
// feature_map<number type, wide>
//
// hybrid_attention_step<number type, lanes, rows of a thread, wide>: a block has 16 x lanes
// threads and holds 16 x rows of the state's F rows, 4 x lanes of its V columns at a time. With 8
// rows a thread has eight loads of 16 bytes in flight, in 32 registers, and two blocks of 16 lanes
// fit the registers of a multiprocessor; 16 and 32 rows are for larger F. 32 lanes hold all of V =
// 128; with more than 8 rows they would spill, so that V is then walked in slices of 64.
//
// wide: rows start at multiples of 16 bytes and are as long. The others are right, not fast.
#pragma once

#define LOL_FEATURE_MAP_INSTANCES_OF(X, T) \
  X(T, true)                               \
  X(T, false)

#define LOL_STEP_INSTANCES_OF(X, T) \
  X(T, 16, 8, true)                 \
  X(T, 32, 8, true)                 \
  X(T, 16, 16, true)                \
  X(T, 16, 32, true)                \
  X(T, 16, 32, false)

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
