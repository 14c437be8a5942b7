// Which keys a query attends by softmax and which by features (SPEC 2), and the bands this draws on
// a tile.
#pragma once
#include "../arguments.h"
#include "tokens.h"

namespace lol {
namespace LOL_ISA {

struct Window {
  int64_t size;
  int kind;
  int64_t sink;

  // Whether queries have softmax keys at all; every one has, or none has.
  bool any() const { return size > 0 || sink > 0; }

  // The first key of query i's softmax window behind the sinks; keys between these and it are
  // linear.
  int64_t start(int64_t i) const { return at_least(window_start(size, kind, i), sink); }
};

// A block of queries: where the window of each starts, counted from the first query. All bands of
// the block are made from it, in vectors, for divisions and 64 bits to be done with.
struct Starts {
  int64_t first, n;
  int32_t at[BLOCK];
  Starts(const Window& window, int64_t first_query, int64_t queries)
      : first(first_query), n(queries) {
    for (int64_t c = 0; c < BLOCK; c++)
      at[c] = within_reach(window.start(first + at_most(c, n - 1)) - first);
  }
  // How far a key lies before the first query.
  int32_t before(int64_t key) const { return within_reach(first - key); }

 private:
  // What is farther away lies outside every window whose keys memory holds, such as sinks do. Sums
  // of two of these stay numbers.
  static int32_t within_reach(int64_t distance) {
    constexpr int64_t REACH = 1 << 29;
    return (int32_t)at_least(at_most(distance, REACH), -REACH);
  }
};

static inline int32_t within(int32_t x, int32_t least, int32_t most) {
  return x < least ? least : x > most ? most : x;
}
// Columns past the last query see nothing.
static inline Band band_of(int64_t n, Band band) {
  for (int64_t c = n; c < BLOCK; c++) band.lo[c] = band.hi[c];
  return band;
}

// Which of the keys [key, key + keys) a block sees by softmax, as linear, and at all.
static inline Band softmax_band(const Starts& s, int64_t key, int64_t keys) {
  const int32_t offset = s.before(key), last = (int32_t)s.n - 1;
  Band band;
  for (int c = 0; c < BLOCK; c++) {
    band.hi[c] = within((c < last ? c : last) + 1 + offset, 0, (int32_t)keys);
    band.lo[c] = within(s.at[c] + offset, 0, band.hi[c]);
  }
  return band_of(s.n, band);
}
static inline Band linear_band(const Starts& s, int64_t key, int64_t keys, int64_t sink = 0) {
  const int32_t offset = s.before(key);
  const int32_t lo = within((int32_t)(at_least(sink - key, 0)), 0, (int32_t)keys);
  Band band;
  for (int c = 0; c < BLOCK; c++) {
    band.hi[c] = within(s.at[c] + offset, 0, (int32_t)keys);
    band.lo[c] = lo < band.hi[c] ? lo : band.hi[c];
  }
  return band_of(s.n, band);
}
static inline Band causal_band(const Starts& s, int64_t key, int64_t keys) {
  const int32_t offset = s.before(key), last = (int32_t)s.n - 1;
  Band band;
  for (int c = 0; c < BLOCK; c++) {
    band.hi[c] = within((c < last ? c : last) + 1 + offset, 0, (int32_t)keys);
    band.lo[c] = 0;
  }
  return band_of(s.n, band);
}

// Lanes of columns [c, c + LANES) that see row j.
static inline VecI in_band(const Band& band, int c, int j) {
  return (load_as<VecI>(band.lo + c) <= splat_int(j)) & (load_as<VecI>(band.hi + c) > splat_int(j));
}

// body(j, keep) for the rows that some of the columns [c, c + LANES) see; keep(v) is v where they
// do and zero (or `otherwise`) elsewhere, at no cost in rows that all of them see.
template <class Body>
static inline void for_band(const Band& band, int c, Body body) {
  const int lo = band.lo[c], hi = band.hi[c + LANES - 1];
  const int full = (int)at_most(band.lo[c + LANES - 1], hi);
  const int full_end = (int)at_least(band.hi[c], full);
  const auto masked = [&](int j) {
    const VecI inside = in_band(band, c, j);
    body(j, [&](Vec v, Vec otherwise = Vec{}) { return select(inside, v, otherwise); });
  };
  int j = lo;
  for (; j < full; j++) masked(j);
  for (; j < full_end; j++) body(j, [](Vec v, Vec = Vec{}) { return v; });
  for (; j < hi; j++) masked(j);
}

// Zeroes the rows [0, n) of a key x query tile that none of the columns [c, c + LANES) see.
static inline void clear_outside(float* tile, const Band& band, int c, int64_t n) {
  for (int j = 0; j < band.lo[c]; j++) store(tile + j * BLOCK + c, Vec{});
  for (int64_t j = at_least(band.hi[c + LANES - 1], band.lo[c]); j < n; j++)
    store(tile + j * BLOCK + c, Vec{});
}

// Zeroes what lies outside the band in rows [0, n) of a key x query tile, uncomputed micro-tiles
// included.
static inline void keep_band(float* tile, const Band& band, int64_t n) {
  for (int c = 0; c < BLOCK; c += LANES) {
    clear_outside(tile, band, c, n);
    for_band(band, c, [&](int j, auto keep) {
      float* p = tile + j * BLOCK + c;
      store(p, keep(load(p)));
    });
  }
}

}  // namespace LOL_ISA
}  // namespace lol
