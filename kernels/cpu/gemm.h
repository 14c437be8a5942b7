// The one matrix product of the library: C[M x N] (+)= A[M x K] B[K x N], or a sum of such
// products, on small tiles in cache.
//
// A is read one broadcast element at a time, so it may be transposed at no cost (row stride rs,
// depth stride ks). B and C are row-major with lanes along N; N is padded to a multiple of LANES.
// Attention is banded: query i sees the key rows [lo_i, hi_i). A Band says so, and products skip
// what it leaves out, in whole micro-tiles, so that a triangle costs a triangle.
#pragma once
#include "exponentials.h"
#include "matrix_unit.h"

namespace lol {
namespace LOL_ISA {

// Tokens in a tile. Keys that leave the window within a block of queries are weighed pair by pair:
// on average BLOCK / 2 of them beyond the useful work, while each block streams the state through
// the caches once. At 32 both cost less than a tenth of the products.
constexpr int BLOCK = 32;

// Which rows (keys) of a tile belong to each column (query): [lo, hi), both non-decreasing in the
// column.
struct Band {
  int32_t lo[BLOCK], hi[BLOCK];
  bool empty() const {
    for (int c = 0; c < BLOCK; c++) {
      if (lo[c] < hi[c]) return false;
    }
    return true;
  }
  bool full(int rows) const { return lo[BLOCK - 1] == 0 && hi[0] >= rows; }
};
// The same from the other side: which columns belong to each row.
static inline Band of_rows(const Band& of_columns) {
  Band band;
  int lo = 0, hi = 0;
  for (int row = 0; row < BLOCK; row++) {
    while (lo < BLOCK && of_columns.hi[lo] <= row) lo++;
    while (hi < BLOCK && of_columns.lo[hi] <= row) hi++;
    band.lo[row] = lo;
    band.hi[row] = hi;
  }
  return band;
}

// What a product may leave out, by a band.
enum class Skip {
  none,
  outputs,          // micro-tiles of C outside it are not written
  depth_of_row,     // row m takes [lo_m, hi_m) of the depth, outside of which A is zero
  depth_of_column,  // column n does, outside of which B is zero
};

struct Operand {
  const float* data;
  int64_t row, depth;  // strides of A along M and along K
};
static inline Operand rows(const float* a, int64_t lda) { return {a, lda, 1}; }
static inline Operand transposed(const float* a, int64_t lda) { return {a, 1, lda}; }

enum class Into { set, add };

// What a word of A and B is: a float, or two bf16 that follow each other along K (the second is
// zero past an odd K). Strides count words. C is fp32.
enum class Format { f32, bf16_pairs };
template <Format format>
static inline Vec exp_below_one_for(Vec x) {
  return format == Format::f32 ? exp_below_one(x) : exp_below_one_for_bf16(x);
}
template <Format format>
static inline Vec exp_within_for(Vec x) {
  return format == Format::f32 ? exp_within(x) : exp_for_bf16_within(x);
}
template <Format format>
static inline BothWays exp_both_ways_within_for(Vec x) {
  return format == Format::f32 ? exp_both_ways_within(x) : exp_both_ways_for_bf16_within(x);
}
static inline int words(Format format, int K) { return format == Format::f32 ? K : (K + 1) / 2; }

// How a row of C is computed depends on its place in a group of this many: parts of a state that go
// from thread to thread come in whole groups, for the same results.
#ifdef LOL_MATRIX_UNIT
constexpr int ROW_GROUP = TILE;
#else
constexpr int ROW_GROUP = 4;
#endif

// One of the products that add up to C, of which there is at least one. A term with Skip::outputs
// is the only one. All have the same a.row, and skip along the same of M and N if they skip.
struct Term {
  int K;
  Operand a;
  const float* b;
  int64_t ldb;
  Skip skip;
  const Band* band;
};
constexpr int MOST_TERMS = 17;
// What stands beside C, or null.
struct Beside {
  const float* before;  // of floats: what is added to instead of C itself, ldc apart
  float* pairs;  // of pairs: gets the rows of C two by two, [ceil(M / 2) x N], where ldc is N
};
void gemm(Format format, int M, int N, const Term* term, int terms, float* c, int64_t ldc,
          Into into, Beside beside = {});
// Multiply-adds after which products ask for lines (requests.h).
int64_t multiply_adds_per_request(Format format);

void gemm(Format format, int M, int N, int K, Operand a, const float* b, int64_t ldb, float* c,
          int64_t ldc, Into into, Skip skip = Skip::none, const Band* band = nullptr);
static inline void gemm(int M, int N, int K, Operand a, const float* b, int64_t ldb, float* c,
                        int64_t ldc, Into into, Skip skip = Skip::none,
                        const Band* band = nullptr) {
  gemm(Format::f32, M, N, K, a, b, ldb, c, ldc, into, skip, band);
}

}  // namespace LOL_ISA
}  // namespace lol
