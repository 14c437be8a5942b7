// The instances of hybrid_attention and linear_attention, for whoever names, compiles or launches
// them: <number type, D, f, sides of the feature map, columns of V of a block, tokens of a chunk>,
// padded. The first that holds a problem runs it; the last of each number type holds all. With F =
// 128 and 64 columns of V, 4 warps hold the state in 72 registers of a thread; with F = 256, in 32
// columns, in 80.
#pragma once

#define LOL_ATTENTION_INSTANCES_OF_16_BITS(X, T) \
  X(T, 64, 128, 1, 64, 64)                       \
  X(T, 64, 64, 2, 64, 64)                        \
  X(T, 128, 64, 2, 64, 64)                       \
  X(T, 128, 128, 2, 32, 64)                      \
  X(T, 256, 64, 2, 64, 32)                       \
  X(T, 256, 256, 2, 16, 32)

#define LOL_ATTENTION_INSTANCES(X)                 \
  X(float, 64, 64, 2, 32, 64)                      \
  X(float, 128, 64, 2, 32, 32)                     \
  X(float, 256, 256, 2, 16, 16)                    \
  LOL_ATTENTION_INSTANCES_OF_16_BITS(X, lol::bf16) \
  LOL_ATTENTION_INSTANCES_OF_16_BITS(X, lol::f16)
