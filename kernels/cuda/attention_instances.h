// The instances of hybrid_attention and linear_attention, for whoever names, compiles or launches
// them: <number type, D, f, sides of the feature map, columns of V of a block, tokens of a chunk,
// tiles of keys in shared memory>, padded. The first that holds a problem and fits a GPU's shared
// memory runs it. A block takes all columns of V where it can: slices repeat the features and the
// scores. What bounds them is registers: with F = 128 and 128 columns, a thread has 68 numbers of
// the state, in 8 warps, and 68 sums of its queries.
//
// D = f = 64 takes so little that two blocks share a multiprocessor of sm_80: they wait for each
// other's keys, and one tile is enough. It and the one-sided instance, which has one tile for that,
// fit the 99 KB of sm_86 and sm_89. Larger ones have a multiprocessor for themselves, and a second
// tile where an A100 has room for it: with windows up to a chunk both are at work, and none is
// asked for twice. The second part of a list is what fits 99 KB in their place.
//
// fp16 is held in fp32 tiles (numbers.cuh).
#pragma once

#define LOL_ATTENTION_INSTANCES_bf16(X) \
  X(lol::bf16, 64, 64, 2, 64, 64, 1)    \
  X(lol::bf16, 64, 128, 1, 64, 64, 1)   \
  X(lol::bf16, 96, 64, 2, 96, 64, 2)    \
  X(lol::bf16, 128, 64, 2, 128, 64, 2)  \
  X(lol::bf16, 128, 128, 2, 32, 64, 1)  \
  X(lol::bf16, 256, 64, 2, 96, 32, 1)   \
  X(lol::bf16, 256, 256, 2, 16, 32, 2)  \
                                        \
  X(lol::bf16, 96, 64, 2, 96, 32, 1)    \
  X(lol::bf16, 128, 64, 2, 64, 32, 2)   \
  X(lol::bf16, 256, 256, 2, 16, 16, 1)

#define LOL_ATTENTION_INSTANCES_OF_32_BITS(X, T) \
  X(T, 64, 64, 2, 32, 64, 2)                     \
  X(T, 96, 64, 2, 48, 32, 2)                     \
  X(T, 128, 64, 2, 32, 32, 2)                    \
  X(T, 256, 256, 2, 16, 16, 1)                   \
                                                 \
  X(T, 64, 64, 2, 32, 32, 1)
#define LOL_ATTENTION_INSTANCES_f32(X) LOL_ATTENTION_INSTANCES_OF_32_BITS(X, float)
#define LOL_ATTENTION_INSTANCES_f16(X) LOL_ATTENTION_INSTANCES_OF_32_BITS(X, lol::f16)

#define LOL_ATTENTION_INSTANCES(X) \
  LOL_ATTENTION_INSTANCES_f32(X) LOL_ATTENTION_INSTANCES_bf16(X) LOL_ATTENTION_INSTANCES_f16(X)
