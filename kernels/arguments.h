// What arguments of the C ABI stand for, wherever they are read. Static: every instruction set
// compiles its own.
#pragma once
#include "lolcats_ops/lolcats_ops.h"

namespace lol {

static inline bool present(const lol_tensor& t) { return t.data || t.ndim; }

// An element of offsets or slots, int32 or int64.
static inline int64_t index_at(const lol_tensor& t, int64_t i) {
  return t.dtype == LOL_I64 ? ((const int64_t*)t.data)[i] : ((const int32_t*)t.data)[i];
}

// F; without a map the D dimensions are the features.
static inline int64_t out_features(const lol_features& features, int64_t D) {
  return present(features.weight) ? features.weight.shape[2] * (features.two_sided ? 2 : 1) : D;
}

// The most keys that a query attends by softmax, sinks aside.
static inline int64_t window_span(int64_t window, int32_t kind) {
  return kind == LOL_TERRACE ? 2 * window : window;
}

// The first key of query i's softmax window, sinks aside; i + 1 where there is no window.
static inline int64_t window_start(int64_t window, int32_t kind, int64_t i) {
  int64_t start = i + 1;
  if (window > 0) start = kind == LOL_TERRACE ? (i / window - 1) * window : i - window + 1;
  return start > 0 ? start : 0;
}

}  // namespace lol
