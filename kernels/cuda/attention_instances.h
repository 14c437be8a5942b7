// The instances of hybrid_attention and linear_attention, for whoever names, compiles or launches
// them: <number type, D, f, sides of the feature map, columns of V of a block>, padded. All have F
// = 128: with 64 columns of V, 4 warps hold the state in 72 registers of a thread.
#pragma once

#define LOL_ATTENTION_INSTANCES_OF(X, T) \
  X(T, 64, 64, 2, 64)                    \
  X(T, 128, 64, 2, 64)                   \
  X(T, 64, 128, 1, 64)

// By lol_dtype, which begins with fp32.
#define LOL_ATTENTION_INSTANCES(X)         \
  LOL_ATTENTION_INSTANCES_OF(X, lol::bf16) \
  LOL_ATTENTION_INSTANCES_OF(X, lol::f16)
