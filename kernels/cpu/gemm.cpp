#include "gemm.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Register blocking. An FMA has a latency of 4-5 cycles and up to two ports, so 8-10 accumulators
// are the least; more rows share each load of B. 16 registers (AVX2): 6 x 2 accumulators + 2 of B +
// 1 of A. 32 registers (AVX-512): 12 x 2 + 2 + 1.
constexpr int ROWS = LANES == 16 ? 12 : 6;
constexpr int PANEL = 2;
// Where a band cuts through the columns, tiles are one vector wide and about as high: their edges
// follow the diagonal.
constexpr int BANDED_ROWS = LANES == 16 ? 16 : 8;

// Strides of A's rows that are known at compile time leave the addressing to the instructions.
constexpr int ANY = 0;

// Unrolled before the compiler decides what lives in registers: else the accumulators take a detour
// over the stack.
#define LOL_UNROLL _Pragma("GCC unroll 16")

template <Format format>
inline Vec multiply_add(Vec sum, Vec a, Vec b) {
#ifdef LOL_PAIRS
  if constexpr (format == Format::bf16_pairs) return add_dot(sum, a, b);
#endif
  return sum + a * b;
}

template <Format format, int R, int P, Into into, int ROW>
inline void micro(int K, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  const int64_t row = ROW == ANY ? a.row : ROW;
  Vec acc[R][P];
  const float* from = c;
  LOL_UNROLL for (int r = 0; r < R; r++, from += ldc) {
    LOL_UNROLL for (int p = 0; p < P; p++) acc[r][p] =
        into == Into::add ? load(from + p * LANES) : Vec{};
  }
  const float* ak = a.data;
  // Two at a time: what the loop itself takes is a sixth of its instructions on AVX2.
  _Pragma("GCC unroll 2") for (int k = 0; k < K; k++, ak += a.depth, b += ldb) {
    Vec bv[P];
    LOL_UNROLL for (int p = 0; p < P; p++) bv[p] = load(b + p * LANES);
    LOL_UNROLL for (int r = 0; r < R; r++) {
      const Vec av = splat(ak[r * row]);
      LOL_UNROLL for (int p = 0; p < P; p++) acc[r][p] = multiply_add<format>(acc[r][p], av, bv[p]);
    }
  }
  asm("" : "+r"(c));  // addresses of rows are not worth keeping over the loop
  LOL_UNROLL for (int r = 0; r < R; r++, c += ldc) {
    LOL_UNROLL for (int p = 0; p < P; p++) store(c + p * LANES, acc[r][p]);
  }
}

struct Range {
  int begin, end;
};

// Queries whose rows meet [m0, m1): both ends of a band never decrease, so counting finds them
// without a branch.
inline Range queries_of(const Band& band, int m0, int m1) {
  int first = 0, last = 0;
  for (int c = 0; c < BLOCK; c++) {
    first += band.hi[c] <= m0;
    last += band.lo[c] < m1;
  }
  return {first, last > first ? last : first};
}

// Keys that some query of [n0, n1) sees.
inline Range keys_of(const Band& band, int n0, int n1, int K) {
  const int end = band.hi[n1 - 1] < K ? band.hi[n1 - 1] : K;
  return {band.lo[n0] < end ? band.lo[n0] : end, end};
}

inline Range depth_of(int m0, int m1, int n0, int n1, int K, Skip skip, const Band* band) {
  switch (skip) {
    case Skip::outputs:
      return band->lo[n0] < m1 && band->hi[n1 - 1] > m0 ? Range{0, K} : Range{0, -1};
    case Skip::keys_of_m:
      return keys_of(*band, m0, m1, K);
    case Skip::keys_of_n:
      return keys_of(*band, n0, n1, K);
    case Skip::queries_of_m:
      return queries_of(*band, m0, m1);
    case Skip::queries_of_n:
      return queries_of(*band, n0, n1);
    case Skip::none:
      break;
  }
  return {0, K};
}

// The depth in words.
template <Format format>
inline Range words_of(Range depth) {
  if (format == Format::f32 || depth.end < depth.begin) return depth;
  return {depth.begin / 2, (depth.end + 1) / 2};
}

struct Product {
  int M, N, K;
  Operand a;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  Skip skip;
  const Band* band;
};

// Rows m.. of one panel, R at a time, the rest by smaller powers of two. R may be less than twice
// the next smaller: the last rows are then two tiles of that, since what R would leave has too few
// accumulators (8 rows are 4 + 4, not 6 + 2).
template <Format format, int R, int P, Into into, int ROW>
inline void panel(const Product& p, int m, int n) {
  constexpr int LESS = R > 8 ? 8 : R > 4 ? 4 : R / 2;
  for (; m + R <= p.M && !(R < 2 * LESS && p.M - m == 2 * LESS); m += R) {
    const Range depth = words_of<format>(depth_of(m, m + R, n, n + P * LANES, p.K, p.skip, p.band));
    const int length = depth.end - depth.begin;
    if (length < 0 || (length == 0 && into == Into::add)) continue;
    const Operand a = {p.a.data + m * p.a.row + depth.begin * p.a.depth, p.a.row, p.a.depth};
    micro<format, R, P, into, ROW>(length, a, p.b + depth.begin * p.ldb + n, p.ldb,
                                   p.c + m * p.ldc + n, p.ldc);
  }
  if constexpr (LESS > 0) {
    if (m < p.M) panel<format, LESS, P, into, ROW>(p, m, n);
  }
}

template <Format format, Into into, int ROW>
inline void panels(const Product& p) {
  const bool by_column =
      p.skip == Skip::outputs || p.skip == Skip::keys_of_n || p.skip == Skip::queries_of_n;
  int n = 0;
  if (!by_column) {
    for (; n + PANEL * LANES <= p.N; n += PANEL * LANES)
      panel<format, ROWS, PANEL, into, ROW>(p, 0, n);
  }
  for (; n < p.N; n += LANES) panel<format, BANDED_ROWS, 1, into, ROW>(p, 0, n);
}

template <Format format, Into into>
inline void by_stride(const Product& p) {
  constexpr int TILE_ROW = format == Format::f32 ? BLOCK : BLOCK / 2;
  if (p.a.row == 1) return panels<format, into, 1>(p);
  if (p.a.row == TILE_ROW) return panels<format, into, TILE_ROW>(p);
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

// Words of A's rows that are made contiguous at a time: 32 rows of them are half of L1.
constexpr int MOST_WORDS = 192;
static_assert(TILE == LANES && BLOCK == 2 * TILE, "tiles are as wide as vectors, blocks two tiles");

// R x P tiles of C; a[R * TILE x K words], b[K words x P * TILE]. Two by two load a tile per
// product, the least that eight tiles allow.
template <int R, int P, Into into>
inline void tiles(int K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                  int64_t ldc) {
  constexpr bool add = into == Into::add;
  float *c01 = c + TILE, *c10 = c + TILE * ldc, *c11 = c10 + TILE;
  add ? tile_load<0>(c, ldc) : tile_zero<0>();
  if (P > 1) add ? tile_load<1>(c01, ldc) : tile_zero<1>();
  if (R > 1) add ? tile_load<2>(c10, ldc) : tile_zero<2>();
  if (R > 1 && P > 1) add ? tile_load<3>(c11, ldc) : tile_zero<3>();
  for (int k = 0; k < K; k += TILE, a += TILE, b += TILE * ldb) {
    tile_load<4>(a, lda);
    tile_load<6>(b, ldb);
    tile_add_dot<0, 4, 6>();
    if (P > 1) tile_load<7>(b + TILE, ldb), tile_add_dot<1, 4, 7>();
    if (R > 1) tile_load<5>(a + TILE * lda, lda), tile_add_dot<2, 5, 6>();
    if (R > 1 && P > 1) tile_add_dot<3, 5, 7>();
  }
  tile_store<0>(c, ldc);
  if (P > 1) tile_store<1>(c01, ldc);
  if (R > 1) tile_store<2>(c10, ldc);
  if (R > 1 && P > 1) tile_store<3>(c11, ldc);
}

// All rows, K words deep: M and K are multiples of TILE. Tiles of A want rows that are contiguous.
template <int R, Into into>
inline void strip(const Product& p, int m, int K) {
  alignas(64) float contiguous[R * TILE * MOST_WORDS];
  const float* a = p.a.data + m * p.a.row;
  int64_t lda = p.a.row;
  if (p.a.depth != 1) {
    for (int k = 0; k < K; k += TILE)
      transpose_rows(contiguous + k, K, a + k * p.a.depth, p.a.depth, R * TILE);
    a = contiguous;
    lda = K;
  }
  float* c = p.c + m * p.ldc;
  int n = 0;
  for (; n + 2 * TILE <= p.N; n += 2 * TILE)
    tiles<R, 2, into>(K, a, lda, p.b + n, p.ldb, c + n, p.ldc);
  if (n < p.N) tiles<R, 1, into>(K, a, lda, p.b + n, p.ldb, c + n, p.ldc);
}

template <Into into>
inline void strips(const Product& p, int K) {
  int m = 0;
  for (; m + 2 * TILE <= p.M; m += 2 * TILE) strip<2, into>(p, m, K);
  if (m < p.M) strip<1, into>(p, m, K);
}

// The matrix unit takes whole tiles, add_dot() the depth and the rows that are left. Bands are not
// worth looking at: what they leave out of A or B is zero, and C is scratch there.
void multiply_by_tiles(Product p, Into into) {
  p.skip = Skip::none;
  const int tiled_rows = p.M / TILE * TILE;
  int left = words(Format::bf16_pairs, p.K);
  if (tiled_rows == 0 || left < TILE) return multiply<Format::bf16_pairs>(p, into);
  Product rest = p;
  rest.M -= tiled_rows;
  rest.a.data += tiled_rows * p.a.row;
  rest.c += tiled_rows * p.ldc;
  multiply<Format::bf16_pairs>(rest, into);
  p.M = tiled_rows;
  while (left >= TILE) {
    const int deep = (left < MOST_WORDS ? left : MOST_WORDS) / TILE * TILE;
    into == Into::add ? strips<Into::add>(p, deep) : strips<Into::set>(p, deep);
    into = Into::add;
    left -= deep;
    p.K -= 2 * deep;
    p.a.data += deep * p.a.depth;
    p.b += deep * p.ldb;
  }
  if (left > 0) multiply<Format::bf16_pairs>(p, into);
}

#endif

}  // namespace

void gemm(Format format, int M, int N, int K, Operand a, const float* b, int64_t ldb, float* c,
          int64_t ldc, Into into, Skip skip, const Band* band) {
  if (skip == Skip::outputs && band->full(M)) skip = Skip::none;
  if ((skip == Skip::keys_of_m || skip == Skip::keys_of_n) && band->full(K)) skip = Skip::none;
  const Product product = {M, N, K, a, b, ldb, c, ldc, skip, band};
#if defined(LOL_MATRIX_UNIT)
  if (format == Format::bf16_pairs) return multiply_by_tiles(product, into);
#elif defined(LOL_PAIRS)
  if (format == Format::bf16_pairs) return multiply<Format::bf16_pairs>(product, into);
#else
  (void)format;
#endif
  multiply<Format::f32>(product, into);
}

}  // namespace LOL_ISA
}  // namespace lol
