// Tokens of one sequence in one head of a [B, H, T, X] tensor: addressing by position, and tiles in
// and out of fp32.
//
// Tiles hold BLOCK tokens. "Transposed" tiles are [X x BLOCK] with tokens along lanes: softmax over
// features or keys is then a reduction over rows, with no horizontal step, and X needs no padding.
// Row tiles are [BLOCK x padded(X)].
#pragma once
#include <stdlib.h>

#include "call.h"
#include "gemm.h"
#include "requests.h"

namespace lol {
namespace LOL_ISA {

static inline int padded(int64_t x) { return (int)((x + LANES - 1) / LANES * LANES); }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int dtype_size(int dtype) { return dtype == LOL_F32 ? 4 : 2; }

// Scratch memory of one thread: taken in order, never given back before the call ends.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* p = next;
    next += (floats + 15) / 16 * 16;
    return p;
  }
};

struct Tokens {
  char* base;
  int64_t stride;  // bytes between physical rows
  const int32_t* index;
  int64_t first;
  int64_t past;  // positions below `past` came with earlier calls: they are in the ring, the sinks
                 // in `sink`
  const char *ring, *sink;
  int64_t ring_size;
  int width, dtype;

  int64_t row_bytes() const { return (int64_t)width * dtype_size(dtype); }
  char* row(int64_t position) const {
    if (position < past) return (char*)ring + (position % ring_size) * row_bytes();
    const int64_t i = position - past;
    return base + (index ? index[i] : first + i) * stride;
  }
  // Whether the n rows from `position` on are `stride` apart. Indices ascend.
  bool evenly_spaced(int64_t position, int64_t n) const {
    const int64_t i = position - past;
    return i >= 0 && (!index || index[i + n - 1] - index[i] == n - 1);
  }
  char* sink_row(int64_t position) const {
    return position < past ? (char*)sink + position * row_bytes() : row(position);
  }
};

static inline Tokens tokens_of(const lol_tensor& t, const Sequence& s, int64_t head) {
  const int64_t size = dtype_size(t.dtype);
  const int64_t offset = (s.batch * t.stride[0] + head * t.stride[1]) * size;
  char* base = t.data ? (char*)t.data + offset : nullptr;  // without elements, there may be no data
  return {base, t.stride[2] * size, s.index, s.first, 0, nullptr, nullptr,
          0,    (int)t.shape[3],    t.dtype};
}

static inline Vec load_converted(const char* p, int dtype) {
  if (dtype == LOL_F32) return load((const float*)p);
  return dtype == LOL_BF16 ? from_bf16((const uint16_t*)p) : from_fp16((const uint16_t*)p);
}
static inline void store_converted(char* p, Vec v, int dtype) {
  if (dtype == LOL_F32) {
    store((float*)p, v);
  } else if (dtype == LOL_BF16) {
    to_bf16((uint16_t*)p, v);
  } else {
    to_fp16((uint16_t*)p, v);
  }
}

// dst[0 .. padded(width)) = the row in fp32, padding zero.
static inline void load_row(float* dst, const char* src, int width, int dtype) {
  const int size = dtype_size(dtype);
  int i = 0;
  for (; i + LANES <= width; i += LANES) store(dst + i, load_converted(src + i * size, dtype));
  if (i == width) return;
  char tail[4 * LANES] = {};
  memcpy(tail, src + i * size, (size_t)((width - i) * size));
  store(dst + i, load_converted(tail, dtype));
}

// The sum of a b over a row.
static inline float dot(const char* a, const char* b, int width, int dtype) {
  const int size = dtype_size(dtype);
  Vec sum = {};
  int j = 0;
  for (; j + LANES <= width; j += LANES)
    sum += load_converted(a + j * size, dtype) * load_converted(b + j * size, dtype);
  if (j < width) {
    float tail_a[LANES], tail_b[LANES];
    load_row(tail_a, a + j * size, width - j, dtype);
    load_row(tail_b, b + j * size, width - j, dtype);
    sum += load(tail_a) * load(tail_b);
  }
  return horizontal_sum(sum);
}
static inline float dot(const float* a, const float* b, int width) {
  return dot((const char*)a, (const char*)b, width, LOL_F32);
}

static inline void store_row(char* dst, const float* src, int width, int dtype) {
  const int size = dtype_size(dtype);
  int i = 0;
  for (; i + LANES <= width; i += LANES) store_converted(dst + i * size, load(src + i), dtype);
  if (i == width) return;
  char tail[4 * LANES];
  store_converted(tail, load(src + i), dtype);
  memcpy(dst + i * size, tail, (size_t)((width - i) * size));
}

// body(i, row) for the n tokens from `position` on.
template <class Body>
static inline void for_rows(const Tokens& t, int64_t position, int64_t n, bool sink, Body body) {
  if (n > 0 && t.evenly_spaced(position, n)) {
    char* row = t.row(position);
    for (int64_t i = 0, stride = t.stride; i < n; i++, row += stride) body(i, row);
  } else {
    for (int64_t i = 0; i < n; i++) body(i, sink ? t.sink_row(position + i) : t.row(position + i));
  }
}

// Row tile of the n tokens from `position` on, rows n .. BLOCK zero.
static inline void load_rows(float* dst, const Tokens& t, int64_t position, int64_t n,
                             bool sink = false) {
  const int ld = padded(t.width), width = t.width, dtype = t.dtype;
  for_rows(t, position, n, sink,
           [=](int64_t i, const char* row) { load_row(dst + i * ld, row, width, dtype); });
  memset(dst + n * ld, 0, 4 * (size_t)((BLOCK - n) * ld));
}

// Asks for the rows of the n tokens from `position` on, for work that has no products to ask for
// them in the midst of,
static inline void prefetch_rows(const Tokens& t, int64_t position, int64_t n) {
  for_rows(t, position, n, false, [bytes = t.row_bytes()](int64_t, const char* row) {
    asm volatile("" : "+r"(row));  // GCC drops functions that do nothing but prefetch
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  });
}
// or has them asked for by the products to come: rows of one head lie too far apart for the
// hardware to foresee a tile of them.
static inline void request_rows(const Tokens& t, int64_t position, int64_t n) {
  if (n <= 0) return;
  bool at_once = !t.evenly_spaced(position, n);
#ifdef LOL_MATRIX_UNIT
  if (t.dtype == LOL_BF16) at_once = true;  // its products want the line buffers for themselves
#endif
  if (at_once) return prefetch_rows(t, position, n);
  Requests::of_thread().add(WantedRows::at(t.row(position), t.stride, n, t.row_bytes()));
}

static inline void store_rows(const Tokens& t, int64_t position, int64_t n, const float* src) {
  const int ld = padded(t.width), width = t.width, dtype = t.dtype;
  for_rows(t, position, n, false,
           [=](int64_t i, char* row) { store_row(row, src + i * ld, width, dtype); });
}

// [X x BLOCK] from BLOCK rows and back. Transposing works on multiples of 4, so tiles have up to 3
// spare rows.
static inline void to_lanes(float* dst, const float* row, int64_t stride, int width) {
  for (int c = 0; c < BLOCK; c += LANES)
    transpose_rows(dst + c, BLOCK, row + c * stride, stride, (width + 3) / 4 * 4);
}
static inline void to_lanes(float* dst, const float* row_tile, int width) {
  to_lanes(dst, row_tile, padded(width), width);
}
static inline void to_rows(float* row_tile, const float* src, int width) {
  for (int c = 0; c < BLOCK; c += LANES)
    transpose_columns(row_tile + c * padded(width), padded(width), src + c, BLOCK,
                      (width + 3) / 4 * 4);
}
static inline int64_t lanes_size(int64_t width) { return (width + 3) / 4 * 4 * BLOCK; }
static inline int64_t rows_size(int64_t width) { return (int64_t)padded(width) * BLOCK; }

// Clears every row of [B, H, T, X], for outputs with rows that belong to no sequence.
static inline void clear(const lol_tensor& t) {
  if (!t.data) return;
  const int64_t bytes = t.shape[3] * dtype_size(t.dtype);
  for (int64_t b = 0; b < t.shape[0]; b++) {
    for (int64_t h = 0; h < t.shape[1]; h++) {
      for (int64_t i = 0; i < t.shape[2]; i++) {
        memset((char*)t.data +
                   (b * t.stride[0] + h * t.stride[1] + i * t.stride[2]) * dtype_size(t.dtype),
               0, bytes);
      }
    }
  }
}

static inline void fill(float* p, int64_t n, float value) {
  for (int64_t i = 0; i < n; i++) p[i] = value;
}

}  // namespace LOL_ISA
}  // namespace lol
