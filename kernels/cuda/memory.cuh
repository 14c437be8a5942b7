// Rows of tensors, 16 bytes a thread where the tensors allow it, else one number.
#pragma once
#include "numbers.cuh"
#include "params.h"

namespace lol {
namespace cuda {

// kWide: every row starts at a multiple of 16 bytes and is as long as one.
template <class T>
constexpr int kPerChunk = 16 / sizeof(T);

__device__ __forceinline__ float4 zero4() { return make_float4(0.f, 0.f, 0.f, 0.f); }
__device__ __forceinline__ float4 splat(float x) { return make_float4(x, x, x, x); }

// a + x * y
__device__ __forceinline__ float4 fma4(float x, float4 y, float4 a) {
  return make_float4(fmaf(x, y.x, a.x), fmaf(x, y.y, a.y), fmaf(x, y.z, a.z), fmaf(x, y.w, a.w));
}
__device__ __forceinline__ float4 add4(float4 a, float4 b) { return fma4(1.f, a, b); }
__device__ __forceinline__ float4 scale4(float x, float4 a) {
  return make_float4(x * a.x, x * a.y, x * a.z, x * a.w);
}

// Columns [4 quad, 4 quad + 4) of a row of `width` numbers; zeros past its end.
template <bool kWide>
__device__ __forceinline__ float4 load_quad(const float* row, int quad, int width) {
  const int c = 4 * quad;
  if (c >= width) return zero4();
  if constexpr (kWide) return *reinterpret_cast<const float4*>(row + c);
  return make_float4(row[c], c + 1 < width ? row[c + 1] : 0.f, c + 2 < width ? row[c + 2] : 0.f,
                     c + 3 < width ? row[c + 3] : 0.f);
}
// One instruction: the compiler makes four of an assignment. Past the L1, for nobody reads it
// there.
__device__ __forceinline__ void store_16_bytes(void* to, uint4 bits) {
  __stcg(static_cast<uint4*>(to), bits);
}

template <bool kWide>
__device__ __forceinline__ void store_quad(float* row, int quad, int width, float4 x) {
  const int c = 4 * quad;
  if (c >= width) return;
  if constexpr (kWide) {
    store_16_bytes(row + c, make_uint4(__float_as_uint(x.x), __float_as_uint(x.y),
                                       __float_as_uint(x.z), __float_as_uint(x.w)));
    return;
  }
  row[c] = x.x;
  if (c + 1 < width) row[c + 1] = x.y;
  if (c + 2 < width) row[c + 2] = x.z;
  if (c + 3 < width) row[c + 3] = x.w;
}

// 16 bytes of numbers.
template <class T>
struct alignas(16) Chunk {
  T at[kPerChunk<T>];
};

// Numbers [first, first + 16 bytes) of a row of `width`; zeros past its end.
template <class T, bool kWide>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int first, int width) {
  Chunk<T> chunk;
  if constexpr (kWide) {
    chunk = *reinterpret_cast<const Chunk<T>*>(row + first);
  } else {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; i++) chunk.at[i] = first + i < width ? row[first + i] : T{};
  }
  return chunk;
}
template <class T, bool kWide>
__device__ __forceinline__ void store_chunk(T* row, int first, int width, const Chunk<T>& chunk) {
  if constexpr (kWide) {
    store_16_bytes(row + first, *reinterpret_cast<const uint4*>(&chunk));
  } else {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; i++) {
      if (first + i < width) row[first + i] = chunk.at[i];
    }
  }
}

template <class T>
__device__ __forceinline__ void store_floats(float* to, const Chunk<T>& x) {
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; i += 4) {
    *reinterpret_cast<float4*>(to + i) = make_float4(to_float(x.at[i]), to_float(x.at[i + 1]),
                                                     to_float(x.at[i + 2]), to_float(x.at[i + 3]));
  }
}

// 16 bytes of numbers, of what is in shared memory, aligned to 16 bytes.
template <class T, class From>
__device__ __forceinline__ Chunk<T> chunk_of(const From* from) {
  if constexpr (kSame<T, From>) {
    return *reinterpret_cast<const Chunk<T>*>(from);
  } else {
    Chunk<T> chunk;
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; i++) chunk.at[i] = convert<T>(from[i]);
    return chunk;
  }
}

// Of a chunk and as many floats in shared memory, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ float dot_chunk(const float* x, const Chunk<T>& y) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(x + i);
    sum = fmaf(four.x, to_float(y.at[i]), sum);
    sum = fmaf(four.y, to_float(y.at[i + 1]), sum);
    sum = fmaf(four.z, to_float(y.at[i + 2]), sum);
    sum = fmaf(four.w, to_float(y.at[i + 3]), sum);
  }
  return sum;
}

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64 batch, int head, int64 token) {
  return static_cast<T*>(rows.data) + batch * rows.batch + head * rows.head + token * rows.token;
}

__device__ __forceinline__ int64 index_at(const Indices& indices, int i) {
  return indices.wide ? static_cast<const int64*>(indices.data)[i]
                      : static_cast<const int*>(indices.data)[i];
}

}  // namespace cuda
}  // namespace lol
