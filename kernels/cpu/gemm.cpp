#include "gemm.h"

#include "pairs.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Register blocking. An FMA has a latency of 4-5 cycles and up to two ports, so 8-10 accumulators
// are the least; more rows share each load of B. 16 registers (AVX2): 6 x 2 accumulators + 2 of B +
// 1 of A. 32 registers (AVX-512): 12 x 2 + 2 + 1. On aarch64, which has 32 as well, compilers load
// the elements of A ahead: GCC keeps the sums of 8 x 2 in registers, which are enough for four
// ports, and not those of 12 x 2.
#ifdef __aarch64__
constexpr int ROWS = 8;
#else
constexpr int ROWS = LANES == 16 ? 12 : 6;
#endif
constexpr int PANEL = 2;
// Where a band cuts through the columns, tiles are one vector wide and about as high: their edges
// follow the diagonal.
constexpr int BANDED_ROWS = LANES == 16 ? 16 : 8;

// Strides of A's rows that are known at compile time leave the addressing to the instructions.
constexpr int ANY = 0;

// Words of the depth after which lines are asked for. Shorter vectors take more turns for as much.
constexpr int DEPTH_PER_REQUEST = 64 / LANES;

// Words of the depth for one turn of the loop: what the loop itself takes was a sixth of its
// instructions on AVX2 with one.
constexpr int AT_ONCE = 4;

// sums += a b^T for one word of the depth.
template <Format format, int R, int P>
inline void add_word(Vec (&sums)[R][P], const float* a, int64_t row, const float* b) {
  Vec bv[P];
  LOL_UNROLL for (int p = 0; p < P; p++) bv[p] = load(b + p * LANES);
  LOL_UNROLL for (int r = 0; r < R; r++) {
    const float* word = a + r * row;
    const Vec av = splat(*word);
    LOL_UNROLL for (int p = 0; p < P; p++) {
      Vec& sum = sums[r][p];
#ifdef LOL_PAIRS
      if constexpr (format == Format::bf16_pairs) {
        sum = P == 1 ? add_dot_of_word(sum, word, bv[p]) : add_dot(sum, av, bv[p]);
        continue;
      }
#endif
      sum = P == 1 ? multiply_add(sum, word, bv[p]) : multiply_add(sum, av, bv[p]);
    }
  }
}

// The part of a term that reaches one tile of C.
struct Depth {
  int length;  // in words
  const float *a, *b;
  int64_t a_stride, b_stride;
};

template <Format format, int R, int P, Into into, int ROW>
__attribute__((noinline)) void micro(const Depth* term, int terms, int64_t a_at, int64_t a_row,
                                     const float* before, float* c, int64_t ldc, float* pairs,
                                     WantedRows& rows) {
  const int64_t row = ROW == ANY ? a_row : ROW;
  Vec acc[R][P];
  WantedRows wanted = rows;
  LOL_UNROLL for (int r = 0; r < R; r++) {
    LOL_UNROLL for (int p = 0; p < P; p++) acc[r][p] = Vec{};
  }
  for (int t = 0; t < terms; t++) {
    const int length = term[t].length;
    const float *ak = term[t].a + a_at, *b = term[t].b;
    int64_t depth = term[t].a_stride, ldb = term[t].b_stride;
    int k = 0;
    for (; k + AT_ONCE <= length; k += AT_ONCE) {
      if (k % DEPTH_PER_REQUEST == 0) wanted.ask();
      LOL_UNROLL for (int pair = 0; pair < AT_ONCE / 2; pair++, ak += 2 * depth, b += 2 * ldb) {
        // Or addresses of all words are kept over the loop, on the stack.
        asm("" : "+r"(ak), "+r"(b), "+r"(depth), "+r"(ldb));
        add_word<format>(acc, ak, row, b);
        add_word<format>(acc, ak + depth, row, b + ldb);
      }
    }
    for (; k < length; k++, ak += depth, b += ldb) add_word<format>(acc, ak, row, b);
  }
  rows.line = wanted.line;
  rows.row_end = wanted.row_end;
  asm("" : "+r"(c));  // addresses of rows are not worth keeping over the loop
  // C last: the sum of a sequence may be so large that a term of this one would vanish in it.
  LOL_UNROLL for (int r = 0; r < R; r++, before += ldc, c += ldc) {
    LOL_UNROLL for (int p = 0; p < P; p++) {
      if (into == Into::add) acc[r][p] += load(before + p * LANES);
      store(c + p * LANES, acc[r][p]);
    }
  }
#ifdef LOL_PAIRS
  if (format == Format::f32 || !pairs) return;
  LOL_UNROLL for (int r = 0; r < R; r += 2, pairs += ldc) {
    LOL_UNROLL for (int p = 0; p < P; p++)
        store(pairs + p * LANES, pair(acc[r][p], r + 1 < R ? acc[r + 1][p] : Vec{}));
  }
#else
  (void)pairs;
#endif
}

struct Range {
  int begin, end;
};

// What some of [i0, i1) take of the depth.
inline Range depth_of(const Band& band, int i0, int i1, int K) {
  const int end = band.hi[i1 - 1] < K ? band.hi[i1 - 1] : K;
  return {band.lo[i0] < end ? band.lo[i0] : end, end};
}

inline Range depth_of(int m0, int m1, int n0, int n1, const Term& term) {
  const Band* band = term.band;
  switch (term.skip) {
    case Skip::outputs:
      return band->lo[n0] < m1 && band->hi[n1 - 1] > m0 ? Range{0, term.K} : Range{0, -1};
    case Skip::depth_of_row:
      return depth_of(*band, m0, m1, term.K);
    case Skip::depth_of_column:
      return depth_of(*band, n0, n1, term.K);
    case Skip::none:
      break;
  }
  return {0, term.K};
}

// The depth in words.
template <Format format>
inline Range words_of(Range depth) {
  if (format == Format::f32 || depth.end < depth.begin) return depth;
  return {depth.begin / 2, (depth.end + 1) / 2};
}

struct Product {
  int M, N, terms;
  const Term* term;
  const float* before;  // C, or what stands for it
  float* c;
  int64_t ldc;
  float* pairs;  // or null
  Requests* requests;
};

// Whether rows of C differ in what reaches them.
inline bool by_row(const Product& p) {
  for (int t = 0; t < p.terms; t++) {
    if (p.term[t].skip == Skip::outputs || p.term[t].skip == Skip::depth_of_row) return true;
  }
  return false;
}

// What of each term reaches the rows [m0, m1) and columns [n0, n1), A and B from row 0 and column
// n0 on. Returns how many terms that are, or -1 if C is left alone there.
template <Format format, Into into>
inline int depths_of(const Product& p, int m0, int m1, int n0, int n1, Depth* to) {
  int count = 0;
  bool left = into == Into::add && p.before == p.c;
  for (int t = 0; t < p.terms; t++) {
    const Term& term = p.term[t];
    const Range depth = words_of<format>(depth_of(m0, m1, n0, n1, term));
    if (depth.end < depth.begin) left = true;
    if (depth.end <= depth.begin) continue;
    to[count++] = {depth.end - depth.begin, term.a.data + depth.begin * term.a.depth,
                   term.b + depth.begin * term.ldb + n0, term.a.depth, term.ldb};
  }
  return count == 0 && left ? -1 : count;
}

// Rows m.. of one panel, R at a time, the rest by smaller powers of two. R may be less than twice
// the next smaller: the last rows are then two tiles of that, since what R would leave has too few
// accumulators (8 rows are 4 + 4, not 6 + 2).
template <Format format, int R, int P, Into into, int ROW>
inline void panel(const Product& p, int m, int n) {
  constexpr int LESS = R > 8 ? 8 : R > 4 ? 4 : R / 2;
  const int64_t row = ROW == ANY ? p.term->a.row : ROW;
  const bool anew = by_row(p);
  Depth depths[MOST_TERMS];
  int terms = -1;
  for (; m + R <= p.M && !(R < 2 * LESS && p.M - m == 2 * LESS); m += R) {
    if (anew || terms < 0) terms = depths_of<format, into>(p, m, m + R, n, n + P * LANES, depths);
    if (terms < 0) continue;
    const int64_t at = m * p.ldc + n;
    micro<format, R, P, into, ROW>(depths, terms, m * row, row, p.before + at, p.c + at, p.ldc,
                                   p.pairs ? p.pairs + m / 2 * p.ldc + n : nullptr,
                                   p.requests->at_hand());
  }
  if constexpr (LESS > 0) {
    if (m < p.M) panel<format, LESS, P, into, ROW>(p, m, n);
  }
}

// Two vectors of queries from n on, of a product that leaves out what its band does: keys that both
// see take tiles of two vectors, whose 12 sums hide the latency that 8 do not quite.
template <Format format, Into into, int ROW>
inline void banded_pair(const Product& p, int n) {
  const Band& band = *p.term->band;
  const int right = n + LANES;
  // Whole tiles, as far as they meet the band.
  const int begin = band.lo[right] / BANDED_ROWS * BANDED_ROWS;
  const int seen = (band.hi[right - 1] + BANDED_ROWS - 1) / BANDED_ROWS * BANDED_ROWS;
  const int end = seen < p.M ? seen : p.M;
  if (begin >= end) {
    panel<format, BANDED_ROWS, 1, into, ROW>(p, 0, n);
    return panel<format, BANDED_ROWS, 1, into, ROW>(p, 0, right);
  }
  Product part = p;
  part.M = begin;
  panel<format, BANDED_ROWS, 1, into, ROW>(part, 0, n);
  panel<format, BANDED_ROWS, 1, into, ROW>(p, end, right);
  Term whole = *p.term;
  whole.skip = Skip::none;
  part.term = &whole;
  part.M = end;
  panel<format, ROWS, PANEL, into, ROW>(part, begin, n);
}

template <Format format, Into into, int ROW>
inline void panels(const Product& p) {
  const Skip skip = p.term->skip;
  const bool by_column = skip == Skip::outputs || skip == Skip::depth_of_column;
  int n = 0;
  // A pair that is all of a block sees all of a tile.
  if (!by_column || BLOCK > PANEL * LANES) {
    for (; n + PANEL * LANES <= p.N; n += PANEL * LANES) {
      if (skip == Skip::outputs) {
        banded_pair<format, into, ROW>(p, n);
      } else {
        panel<format, ROWS, PANEL, into, ROW>(p, 0, n);
      }
    }
  }
  for (; n < p.N; n += LANES) panel<format, BANDED_ROWS, 1, into, ROW>(p, 0, n);
}

template <Format format, Into into>
inline void by_stride(const Product& p) {
  constexpr int TILE_ROW = format == Format::f32 ? BLOCK : BLOCK / 2;
  const int64_t row = p.term->a.row;
  if (row == 1) return panels<format, into, 1>(p);
  if (row == TILE_ROW) return panels<format, into, TILE_ROW>(p);
  panels<format, into, ANY>(p);
}

template <Format format>
inline void multiply(const Product& p, Into into) {
  if (into == Into::set) {
    by_stride<format, Into::set>(p);
  } else {
    by_stride<format, Into::add>(p);
  }
}

#ifdef LOL_MATRIX_UNIT

// Slices of a product's depth that are taken at a time: A's rows in them, made contiguous, are half
// of L1.
constexpr int MOST_SLICES = 12;
static_assert(TILE == LANES && BLOCK == 2 * TILE, "tiles are as wide as vectors, blocks two tiles");

// TILE words of a term's depth.
struct Slice {
  const float *a, *b;
  int64_t a_row, a_stride, b_stride;
};

// C (+)= tile 3 times tile B, by way of tile T.
template <int T, int B, Into into>
inline void add_to(float* c, int64_t ldc) {
  into == Into::add ? tile_load<T>(c, ldc) : tile_zero<T>();
  tile_add_dot<T, 3, B>();
  tile_store<T>(c, ldc);
}

// R x P tiles of C. Two by two load a tile per product, the least that eight tiles allow.
template <int R, int P, Into into>
inline void tiles(const Slice* slice, int slices, int n, float* c, int64_t ldc) {
  constexpr bool add = into == Into::add;
  float *c01 = c + TILE, *c10 = c + TILE * ldc, *c11 = c10 + TILE;
  add ? tile_load<0>(c, ldc) : tile_zero<0>();
  if (P > 1) add ? tile_load<1>(c01, ldc) : tile_zero<1>();
  if (R > 1) add ? tile_load<2>(c10, ldc) : tile_zero<2>();
  if (R > 1 && P > 1) add ? tile_load<3>(c11, ldc) : tile_zero<3>();
  for (int k = 0; k < slices; k++) {
    const Slice& s = slice[k];
    tile_load<4>(s.a, s.a_row);
    tile_load<6>(s.b + n, s.b_stride);
    tile_add_dot<0, 4, 6>();
    if (P > 1) tile_load<7>(s.b + n + TILE, s.b_stride), tile_add_dot<1, 4, 7>();
    if (R > 1) tile_load<5>(s.a + TILE * s.a_row, s.a_row), tile_add_dot<2, 5, 6>();
    if (R > 1 && P > 1) tile_add_dot<3, 5, 7>();
  }
  tile_store<0>(c, ldc);
  if (P > 1) tile_store<1>(c01, ldc);
  if (R > 1) tile_store<2>(c10, ldc);
  if (R > 1 && P > 1) tile_store<3>(c11, ldc);
}

// A single slice: `columns` tiles of B stay, and those of C come and go through the three that are
// left. Two by two would load a tile of A or B for every product, besides those of C.
template <int columns, Into into>
inline void rank_update(const Product& p, const Slice& s, int n) {
  const float *a = s.a, *b = s.b + n;
  float* c = p.c + n;
  tile_load<4>(b, s.b_stride);
  if (columns > 1) tile_load<5>(b + TILE, s.b_stride);
  if (columns > 2) tile_load<6>(b + 2 * TILE, s.b_stride);
  if (columns > 3) tile_load<7>(b + 3 * TILE, s.b_stride);
  for (int m = 0; m < p.M; m += TILE, a += TILE * s.a_row, c += TILE * p.ldc) {
    tile_load<3>(a, s.a_row);
    add_to<0, 4, into>(c, p.ldc);
    if (columns > 1) add_to<1, 5, into>(c + TILE, p.ldc);
    if (columns > 2) add_to<2, 6, into>(c + 2 * TILE, p.ldc);
    if (columns > 3) add_to<0, 7, into>(c + 3 * TILE, p.ldc);
  }
}
template <Into into>
inline void rank_updates(const Product& p, const Slice& s) {
  int n = 0;
  for (; n + 4 * TILE <= p.N; n += 4 * TILE) rank_update<4, into>(p, s, n);
  const int columns = (p.N - n) / TILE;
  if (columns == 3) rank_update<3, into>(p, s, n);
  if (columns == 2) rank_update<2, into>(p, s, n);
  if (columns == 1) rank_update<1, into>(p, s, n);
}

// All columns of R x TILE rows. Tiles of A want rows that are contiguous.
template <int R, Into into>
inline void strip(const Product& p, const Slice* slice, int slices, int m) {
  alignas(64) float contiguous[MOST_SLICES * R * TILE * TILE];
  Slice of_rows[MOST_SLICES];
  for (int k = 0; k < slices; k++) {
    Slice& s = of_rows[k] = slice[k];
    s.a += m * s.a_row;
    if (s.a_stride == 1) continue;
    float* to = contiguous + k * R * TILE * TILE;
    transpose_rows(to, TILE, s.a, s.a_stride, R * TILE);
    s.a = to;
    s.a_row = TILE;
  }
  float* c = p.c + m * p.ldc;
  int n = 0;
  for (; n + 2 * TILE <= p.N; n += 2 * TILE) tiles<R, 2, into>(of_rows, slices, n, c + n, p.ldc);
  if (n < p.N) tiles<R, 1, into>(of_rows, slices, n, c + n, p.ldc);
}

template <Into into>
inline void strips(const Product& p, const Slice* slice, int slices) {
  if (slices == 1 && slice->a_stride == 1) return rank_updates<into>(p, *slice);
  int m = 0;
  for (; m + 2 * TILE <= p.M; m += 2 * TILE) strip<2, into>(p, slice, slices, m);
  if (m < p.M) strip<1, into>(p, slice, slices, m);
}

// The matrix unit takes whole tiles, add_dot() the depth and the rows that are left. Bands are not
// worth looking at: what they leave out of A or B is zero, and C is scratch there.
void multiply_by_tiles(const Product& all, Into into) {
  const int tiled_rows = all.M / TILE * TILE;
  Term left[MOST_TERMS];
  const auto multiply_left = [&](int m, int rows, int terms, Into how) {
    float* c = all.c + m * all.ldc;
    multiply<Format::bf16_pairs>({rows, all.N, terms, left, c, c, all.ldc, nullptr, all.requests},
                                 how);
  };
  if (tiled_rows < all.M) {
    for (int t = 0; t < all.terms; t++) {
      (left[t] = all.term[t]).skip = Skip::none;
      left[t].a.data += tiled_rows * left[t].a.row;
    }
    multiply_left(tiled_rows, all.M - tiled_rows, all.terms, into);
  }
  if (tiled_rows == 0) return;
  Product tiled = all;
  tiled.M = tiled_rows;
  Slice slice[MOST_SLICES];
  int slices = 0, terms_left = 0;
  const auto multiply_slices = [&] {
    into == Into::add ? strips<Into::add>(tiled, slice, slices)
                      : strips<Into::set>(tiled, slice, slices);
    into = Into::add;
    slices = 0;
  };
  for (int t = 0; t < all.terms; t++) {
    const Term& term = all.term[t];
    const int whole = words(Format::bf16_pairs, term.K) / TILE * TILE;
    for (int k = 0; k < whole; k += TILE) {
      slice[slices++] = {term.a.data + k * term.a.depth, term.b + k * term.ldb, term.a.row,
                         term.a.depth, term.ldb};
      if (slices == MOST_SLICES) multiply_slices();
    }
    if (whole > 0 && term.K <= 2 * whole) continue;
    Term& rest = left[terms_left++] = term;
    rest.skip = Skip::none;
    rest.K -= 2 * whole;
    rest.a.data += whole * rest.a.depth;
    rest.b += whole * rest.ldb;
  }
  if (slices > 0) multiply_slices();
  if (terms_left > 0) multiply_left(0, tiled_rows, terms_left, into);
}

#endif

}  // namespace

int64_t multiply_adds_per_request(Format format) {
  return (int64_t)ROWS * PANEL * LANES * DEPTH_PER_REQUEST * (format == Format::f32 ? 1 : 2);
}

void gemm(Format format, int M, int N, const Term* term, int terms, float* c, int64_t ldc,
          Into into, Beside beside) {
  const float* before = beside.before ? beside.before : c;
  const Product product = {M, N, terms, term, before, c, ldc, beside.pairs, &Requests::of_thread()};
#if defined(LOL_MATRIX_UNIT)
  if (format == Format::bf16_pairs) {
    multiply_by_tiles(product, into);
    if (beside.pairs) pair_rows(beside.pairs, c, M, N);
    return;
  }
#elif defined(LOL_PAIRS)
  if (format == Format::bf16_pairs) return multiply<Format::bf16_pairs>(product, into);
#else
  (void)format;
#endif
  multiply<Format::f32>(product, into);
}

void gemm(Format format, int M, int N, int K, Operand a, const float* b, int64_t ldb, float* c,
          int64_t ldc, Into into, Skip skip, const Band* band) {
  if (skip == Skip::outputs && band->full(M)) skip = Skip::none;
  if ((skip == Skip::depth_of_row || skip == Skip::depth_of_column) && band->full(K))
    skip = Skip::none;
  const Term term = {K, a, b, ldb, skip, band};
  gemm(format, M, N, &term, 1, c, ldc, into);
}

}  // namespace LOL_ISA
}  // namespace lol
