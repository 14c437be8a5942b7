// The number types of tensors. They are stored, loaded and multiplied by tensor cores; arithmetic
// is in fp32.
#pragma once

#include "device.cuh"

namespace lol {

struct bf16 {
  unsigned short bits;
};

struct f16 {
  unsigned short bits;
};

// The number in the low 16 bits.
template <class T>
__device__ __forceinline__ float low(unsigned pair);
template <>
__device__ __forceinline__ float low<bf16>(unsigned pair) {
  return __uint_as_float(pair << 16);
}
template <>
__device__ __forceinline__ float low<f16>(unsigned pair) {
  return ptx::from_f16(static_cast<unsigned short>(pair));
}

template <class T>
__device__ __forceinline__ float high(unsigned pair);
template <>
__device__ __forceinline__ float high<bf16>(unsigned pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
template <>
__device__ __forceinline__ float high<f16>(unsigned pair) {
  return low<f16>(pair >> 16);
}

// Two numbers in 32 bits, as tensor cores take them; rounded to nearest even.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<bf16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}
template <>
__device__ __forceinline__ unsigned pack<f16>(float low, float high) {
  return ptx::pack_f16(low, high);
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

// d += a b for tiles of 16 x 16 and 16 x 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]);
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

}  // namespace lol
