/* What the C tests share: checks that print their line, and tensors over plain arrays. */
#ifndef TESTING_H
#define TESTING_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lolcats_ops/lolcats_ops.h"

#define CHECK(condition)                                                               \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, \
              lol_last_error());                                                       \
      exit(1);                                                                         \
    }                                                                                  \
  } while (0)

enum { B = 1, T = 6, H = 2, D = 4, V = 3, F = 4, WIDE = 2 * F, WINDOW = 2, RING = 3 };

static inline lol_tensor tensor(void* data, int dtype, int ndim, const int64_t* shape) {
  lol_tensor t = {data, dtype, ndim, {0}, {0}};
  int64_t step = 1;
  for (int i = ndim - 1; i >= 0; i--) {
    t.shape[i] = shape[i];
    t.stride[i] = step;
    step *= shape[i];
  }
  return t;
}

/* A contiguous fp32 tensor over an array: TENSOR(array, size, size, ...). */
#define TENSOR(data, ...)                                                          \
  tensor(data, LOL_F32, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), \
         (const int64_t[]){__VA_ARGS__})

/* The arrays of `batch` states with `ring` slots and no sinks. */
static inline lol_state state_of(float* kv, float* ksum, float* k_ring, float* v_ring,
                                 int64_t* length, int64_t* folded, int64_t batch, int64_t ring) {
  const int64_t slots[] = {batch};
  lol_state s = {0};
  s.kv = TENSOR(kv, batch, H, WIDE, V);
  s.ksum = TENSOR(ksum, batch, H, WIDE);
  s.k_ring = TENSOR(k_ring, batch, H, ring, D);
  s.v_ring = TENSOR(v_ring, batch, H, ring, V);
  s.k_sink = TENSOR(NULL, batch, H, 0, D);
  s.v_sink = TENSOR(NULL, batch, H, 0, V);
  s.length = tensor(length, LOL_I64, 1, slots);
  s.folded = tensor(folded, LOL_I64, 1, slots);
  return s;
}

/* Deterministic values in [-1, 1). */
static inline void fill(float* x, int n, unsigned seed) {
  for (int i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    x[i] = (float)(seed >> 8) / (1 << 23) - 1;
  }
}
#define FILL(array, seed) fill(array, (int)(sizeof(array) / sizeof(float)), seed)

static inline int is_close(const float* a, const float* b, int n, float tolerance) {
  for (int i = 0; i < n; i++)
    if (!(fabsf(a[i] - b[i]) <= tolerance)) return 0;
  return 1;
}
#endif
