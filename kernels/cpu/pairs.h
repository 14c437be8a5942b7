// Tiles in either format (gemm.h): of floats, or of pairs of bf16, words of two neighbours along
// the dimension that a product sums over. Tokens of bf16 become pairs without being converted.
#pragma once
#include "tokens.h"

namespace lol {
namespace LOL_ISA {

// dst[ceil(rows / 2) x cols] = pairs of rows of src[rows x cols], possibly in place.
static inline void pair_rows(float* dst, const float* src, int rows, int cols) {
#ifdef LOL_PAIRS
  for (; rows > 1; rows -= 2, src += 2 * cols, dst += cols) {
    for (int c = 0; c < cols; c += LANES) store(dst + c, pair(load(src + c), load(src + cols + c)));
  }
  for (int c = 0; c < rows * cols; c += LANES) store(dst + c, pair(load(src + c), Vec{}));
#else
  (void)dst, (void)src, (void)rows, (void)cols;
#endif
}
// Rows of tile[rows x BLOCK] become pairs in their place, and sums[BLOCK] take in what they became.
static inline void round_rows(float* tile, int rows, float* sums) {
#ifdef LOL_PAIRS
  pair_rows(tile, tile, rows, BLOCK);
  const int n = words(Format::bf16_pairs, rows);
  const Vec ones = pair(splat(1.0f), splat(1.0f));
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec even = load(sums + c), odd = {};
    int i = 0;
    for (; i + 1 < n; i += 2) {
      even = add_dot(even, load(tile + i * BLOCK + c), ones);
      odd = add_dot(odd, load(tile + (i + 1) * BLOCK + c), ones);
    }
    if (i < n) even = add_dot(even, load(tile + i * BLOCK + c), ones);
    store(sums + c, even + odd);
  }
#else
  (void)tile, (void)rows, (void)sums;
#endif
}
// dst[rows x cols / 2] = pairs along the rows of src[rows x cols].
static inline void pair_columns(float* dst, const float* src, int rows, int cols = BLOCK) {
  uint16_t* to = (uint16_t*)dst;
  for (int64_t i = 0; i < (int64_t)rows * cols; i += LANES) to_bf16(to + i, load(src + i));
}
// Both of src[rows x cols], which is read once.
static inline void pair_both_ways(float* by_rows, float* by_columns, const float* src, int rows,
                                  int cols) {
#ifdef LOL_PAIRS
  uint16_t* to = (uint16_t*)by_columns;
  for (; rows > 1; rows -= 2, src += 2 * cols, by_rows += cols, to += 2 * cols) {
    for (int c = 0; c < cols; c += LANES) {
      const Halves both = halves(load(src + c), load(src + cols + c));
      store(by_rows + c, pairs_of(both));
      store_first_half(to + c, both);
      store_second_half(to + cols + c, both);
    }
  }
  for (int c = 0; c < rows * cols; c += LANES) {
    const Halves last = halves(load(src + c), Vec{});
    store(by_rows + c, pairs_of(last));
    store_first_half(to + c, last);
  }
#else
  (void)by_rows, (void)by_columns, (void)src, (void)rows, (void)cols;
#endif
}
// Pairs along the columns, dst[rows x cols / 2], of pairs of rows, src[ceil(rows / 2) x cols].
static inline void columns_of_rows(float* dst, const float* src, int rows, int cols = BLOCK) {
#ifdef LOL_PAIRS
  uint16_t* to = (uint16_t*)dst;
  for (int i = 0; i < rows; i += 2, src += cols, to += 2 * cols) {
    for (int c = 0; c < cols; c += LANES) {
      const Vec word = load(src + c);
      const Halves both = halves(first_of(word), second_of(word));
      store_first_half(to + c, both);
      if (i + 1 < rows) store_second_half(to + cols + c, both);
    }
  }
#else
  (void)dst, (void)src, (void)rows, (void)cols;
#endif
}

// to[cols] = factor times the sum of n rows, pairs of rows of which there are BLOCK / 2.
static inline void sum_of_rows(float* to, float factor, const float* pairs, int n, int cols) {
#ifdef LOL_PAIRS
  alignas(64) float factors[BLOCK / 2];
  fill(factors, BLOCK / 2, pair(splat(factor), splat(factor))[0]);
  gemm(Format::bf16_pairs, 1, cols, n, rows(factors, BLOCK / 2), pairs, cols, to, cols, Into::set);
#else
  (void)to, (void)factor, (void)pairs, (void)n, (void)cols;
#endif
}

// Rows as they are, in words: [n x padded(words)], the rest of the BLOCK rows zero.
static inline void load_words(float* dst, const Tokens& t, int64_t position, int64_t n, bool sink) {
  const int64_t bytes = t.row_bytes(), ld = padded((bytes + 3) / 4);
  for (int64_t i = 0; i < n; i++) {
    char* to = (char*)(dst + i * ld);
    memcpy(to, sink ? t.sink_row(position + i) : t.row(position + i), (size_t)bytes);
    memset(to + bytes, 0, (size_t)(4 * ld - bytes));
  }
  memset(dst + n * ld, 0, 4 * (size_t)((BLOCK - n) * ld));
}

// The n tokens from `position` on as [X x BLOCK], or pairs along X; `scratch` holds a row tile.
static inline void load_lanes(float* dst, const Tokens& t, int64_t position, int64_t n,
                              Format format, float* scratch, bool sink = false) {
  const int width = words(format, t.width);
  const bool readable =
      format == Format::f32 ? t.dtype == LOL_F32 : t.width % 2 == 0 && t.stride % 4 == 0;
  if (readable && width % 4 == 0 && n == BLOCK && t.evenly_spaced(position, n))
    return to_lanes(dst, (const float*)t.row(position), t.stride / 4, width);
  if (format == Format::f32) {
    load_rows(scratch, t, position, n, sink);
  } else {
    load_words(scratch, t, position, n, sink);
  }
  to_lanes(dst, scratch, width);
}

// LANES bf16, or the first `count` and zeros, as the lower halves of words.
static inline VecU load_halves(const uint16_t* p, int64_t count) {
  if (count >= LANES) return load_halves(p);
  uint16_t tail[LANES] = {};
  memcpy(tail, p, sizeof(uint16_t) * (size_t)count);
  return load_halves(tail);
}

// The n tokens from `position` on as rows [BLOCK x padded(X)], or pairs of tokens [BLOCK / 2 x
// padded(X)].
static inline void load_values(float* dst, const Tokens& t, int64_t position, int64_t n,
                               Format format, bool sink = false) {
  if (format == Format::f32) return load_rows(dst, t, position, n, sink);
  const auto row = [&](int64_t i) {
    return (const uint16_t*)(sink ? t.sink_row(position + i) : t.row(position + i));
  };
  const int ld = padded(t.width);
  const int width = t.width;
  const auto words_of = [&](const uint16_t* a, auto second_from) {
    for (int j = 0; j < width; j += LANES)
      store(dst + j, (Vec)(load_halves(a + j, width - j) | second_from(j) << 16));
    dst += ld;
  };
  int64_t i = 0;
  for (; i + 1 < n; i += 2)
    words_of(row(i), [=, b = row(i + 1)](int j) { return load_halves(b + j, width - j); });
  if (i < n) words_of(row(i), [](int) { return VecU{}; });
  memset(dst, 0, sizeof(float) * (size_t)((BLOCK / 2 - (n + 1) / 2) * ld));
}

// Both: [X x BLOCK] and rows.
static inline void load_both_ways(float* lanes, float* rows, const Tokens& t, int64_t position,
                                  int64_t n, Format format, float* scratch, bool sink = false) {
  load_values(rows, t, position, n, format, sink);
  if (format == Format::f32) return to_lanes(lanes, rows, t.width);
  load_lanes(lanes, t, position, n, format, scratch, sink);
}

}  // namespace LOL_ISA
}  // namespace lol
