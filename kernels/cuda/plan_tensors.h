// What plans take from the tensors of a call.
#pragma once
#include <cstdint>

#include "lolcats_ops/lolcats_ops.h"
#include "params.h"

namespace lol {
namespace cuda {

inline int size_of(int dtype) { return dtype == LOL_F32 ? 4 : 2; }
inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

inline Rows rows_of(const lol_tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }
inline Maps maps_of(const lol_features& f, int64_t heads) {
  return {static_cast<const float*>(f.weight.data), static_cast<const float*>(f.bias.data),
          static_cast<int>(heads / f.weight.shape[0])};
}
inline Activation activation_of(const lol_features& f) {
  return {f.activation, f.two_sided != 0, f.skip != 0, static_cast<float>(f.eps)};
}
inline MapShape shape_of(const lol_features& f) {
  const int D = static_cast<int>(f.weight.shape[1]), width = static_cast<int>(f.weight.shape[2]);
  int shift = 0;
  while (4 << shift < width) shift++;
  return {D, width, f.two_sided ? 2 * width : width, round_up(D, 8), shift};
}
inline Indices indices_of(const lol_tensor& t) { return {t.data, t.dtype == LOL_I64}; }

// Whether every row starts at and is a multiple of 16 bytes.
inline bool is_wide(const lol_tensor& t) {
  const int64_t chunk = 16 / size_of(t.dtype);
  bool wide = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.shape[t.ndim - 1] % chunk == 0;
  for (int i = 0; i + 1 < t.ndim; i++) wide &= t.shape[i] == 1 || t.stride[i] % chunk == 0;
  return wide;
}

}  // namespace cuda
}  // namespace lol
