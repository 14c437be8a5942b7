#include "gemm.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Register blocking. An FMA has a latency of 4-5 cycles and two ports, so 8-10 accumulators are the
// least; more rows share each load of B. 16 registers (AVX2): 6 x 2 accumulators + 2 of B + 1 of A.
// 32 registers (AVX-512): 12 x 2 + 2 + 1.
constexpr int ROWS = LANES == 16 ? 12 : 6;
constexpr int PANEL = 2;

template <int R, int P, Into into>
inline void micro(int K, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec acc[R][P] = {};
  const float* ak = a.data;
  for (int k = 0; k < K; k++, ak += a.depth, b += ldb) {
    Vec bv[P];
    for (int p = 0; p < P; p++) bv[p] = load(b + p * LANES);
    for (int r = 0; r < R; r++) {
      const Vec av = splat(ak[r * a.row]);
      for (int p = 0; p < P; p++) acc[r][p] += av * bv[p];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int p = 0; p < P; p++) {
      float* out = c + r * ldc + p * LANES;
      store(out, into == Into::add ? load(out) + acc[r][p] : acc[r][p]);
    }
  }
}

struct Range {
  int begin, end;
};

// Queries whose rows meet [m0, m1).
inline Range queries_of(const Band& band, int m0, int m1) {
  int first = 0, last = BLOCK;
  while (first < BLOCK && band.hi[first] <= m0) first++;
  while (last > first && band.lo[last - 1] >= m1) last--;
  return {first, last};
}

inline Range depth_of(int m0, int m1, int n0, int n1, int K, Skip skip, const Band* band) {
  switch (skip) {
    case Skip::outputs:
      return band->lo[n0] < m1 && band->hi[n1 - 1] > m0 ? Range{0, K} : Range{0, -1};
    case Skip::depth_keys: {
      const int end = band->hi[n1 - 1] < K ? band->hi[n1 - 1] : K;
      return {band->lo[n0] < end ? band->lo[n0] : end, end};
    }
    case Skip::depth_queries:
      return queries_of(*band, m0, m1);
    case Skip::depth_queries_n:
      return queries_of(*band, n0, n1);
    case Skip::none:
      break;
  }
  return {0, K};
}

template <int P, Into into>
inline void panel(int M, int n0, int K, Operand a, const float* b, int64_t ldb, float* c,
                  int64_t ldc, Skip skip, const Band* band) {
  for (int m = 0; m < M;) {
    const int rest = M - m;
    const int step = rest >= ROWS ? ROWS : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
    const Range depth = depth_of(m, m + step, n0, n0 + P * LANES, K, skip, band);
    const int length = depth.end - depth.begin;
    if (length > 0 || (length == 0 && into == Into::set)) {
      const Operand am = {a.data + m * a.row + depth.begin * a.depth, a.row, a.depth};
      const float* bk = b + depth.begin * ldb + n0;
      float* cm = c + m * ldc + n0;
      switch (step) {
        case ROWS:
          micro<ROWS, P, into>(length, am, bk, ldb, cm, ldc);
          break;
        case 4:
          micro<4, P, into>(length, am, bk, ldb, cm, ldc);
          break;
        case 2:
          micro<2, P, into>(length, am, bk, ldb, cm, ldc);
          break;
        default:
          micro<1, P, into>(length, am, bk, ldb, cm, ldc);
      }
    }
    m += step;
  }
}

template <Into into>
inline void panels(int M, int N, int K, Operand a, const float* b, int64_t ldb, float* c,
                   int64_t ldc, Skip skip, const Band* band) {
  int n = 0;
  for (; n + PANEL * LANES <= N; n += PANEL * LANES)
    panel<PANEL, into>(M, n, K, a, b, ldb, c, ldc, skip, band);
  for (; n < N; n += LANES) panel<1, into>(M, n, K, a, b, ldb, c, ldc, skip, band);
}

}  // namespace

void gemm(int M, int N, int K, Operand a, const float* b, int64_t ldb, float* c, int64_t ldc,
          Into into, Skip skip, const Band* band) {
  if (into == Into::set) {
    panels<Into::set>(M, N, K, a, b, ldb, c, ldc, skip, band);
  } else {
    panels<Into::add>(M, N, K, a, b, ldb, c, ldc, skip, band);
  }
}

}  // namespace LOL_ISA
}  // namespace lol
