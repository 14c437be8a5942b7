// The number types of tensors. They are stored, loaded and multiplied by tensor cores; arithmetic
// is in fp32.
#pragma once

#include "device.cuh"

namespace lol {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct bf16 {
  unsigned short bits;
};

struct f16 {
  unsigned short bits;
};

// The number type of tiles in shared memory, and of products of them. fp16 would hold neither sums
// of features, which outgrow 65504, nor small features and gates, which are 0 below 6e-8.
template <class T>
struct TiledOf {
  using Type = T;
};
template <>
struct TiledOf<f16> {
  using Type = float;
};
template <class T>
using Tiled = typename TiledOf<T>::Type;

// Two numbers side by side, as tensor cores take them.
template <class T>
struct PairOf {
  using Type = unsigned;
};
template <>
struct PairOf<float> {
  using Type = float2;
};
template <class T>
using Pair = typename PairOf<T>::Type;

// The first one, in the low bits.
template <class T>
__device__ __forceinline__ float low(Pair<T> pair);
template <>
__device__ __forceinline__ float low<bf16>(unsigned pair) {
  return __uint_as_float(pair << 16);
}
template <>
__device__ __forceinline__ float low<f16>(unsigned pair) {
  return ptx::from_f16(static_cast<unsigned short>(pair));
}
template <>
__device__ __forceinline__ float low<float>(float2 pair) {
  return pair.x;
}

template <class T>
__device__ __forceinline__ float high(Pair<T> pair);
template <>
__device__ __forceinline__ float high<bf16>(unsigned pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
template <>
__device__ __forceinline__ float high<f16>(unsigned pair) {
  return low<f16>(pair >> 16);
}
template <>
__device__ __forceinline__ float high<float>(float2 pair) {
  return pair.y;
}

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ Pair<T> pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}
template <>
__device__ __forceinline__ unsigned pack<f16>(float low, float high) {
  return ptx::pack_f16(low, high);
}
template <>
__device__ __forceinline__ float2 pack<float>(float low, float high) {
  return make_float2(low, high);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return low<bf16>(x.bits); }
__device__ __forceinline__ float to_float(f16 x) { return low<f16>(x.bits); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return T{static_cast<unsigned short>(pack<T>(x, 0.f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (kSame<To, From>) {
    return x;
  } else {
    return from_float<To>(to_float(x));
  }
}

// d += a b for tiles of 16 x 16 and 16 x 8. Operands are those of mma.m16n8k16: a pair has two
// neighbours in the direction that is summed.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const Pair<T> (&a)[4],
                                             const Pair<T> (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const unsigned (&a)[4],
                                                   const unsigned (&b)[2]) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}
template <>
__device__ __forceinline__ void mma_m16n8k16<f16>(float (&d)[4], const unsigned (&a)[4],
                                                  const unsigned (&b)[2]) {
  ptx::mma_m16n8k16_f16(d, a, b);
}

// x = high + low, to 22 bits.
__device__ __forceinline__ void split(unsigned& high, unsigned& low, float x) {
  high = ptx::to_tf32(x);
  low = ptx::to_tf32(x - __uint_as_float(high));
}

// fp32 as three products of tf32. The order of what is summed is free: where mma.m16n8k8 has
// columns i and i + 4, the first and second number of pair i are.
template <>
__device__ __forceinline__ void mma_m16n8k16<float>(float (&d)[4], const float2 (&a)[4],
                                                    const float2 (&b)[2]) {
#pragma unroll
  for (int step = 0; step < 2; step++) {
    unsigned a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
      split(a_high[row], a_low[row], a[2 * step + row].x);
      split(a_high[2 + row], a_low[2 + row], a[2 * step + row].y);
    }
    split(b_high[0], b_low[0], b[step].x);
    split(b_high[1], b_low[1], b[step].y);
    ptx::mma_m16n8k8_tf32(d, a_low, b_high);
    ptx::mma_m16n8k8_tf32(d, a_high, b_low);
    ptx::mma_m16n8k8_tf32(d, a_high, b_high);
  }
}

}  // namespace lol
