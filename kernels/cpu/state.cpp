#include "state.h"

namespace lol {
namespace LOL_ISA {
namespace {

// to[i] = the sum of the lanes of row(i) (+ from[i]), for four i at a time.
template <class Row>
void sum_lanes(const float* from, float* to, int F, Into into, Row row) {
  const auto sums_from = [&](int i, int last) {
    Vec lanes[4];
    for (int r = 0; r < 4; r++) lanes[r] = row(r < last ? i + r : i + last);
    return sums_of_4(lanes);
  };
  int i = 0;
  for (; i + 4 <= F; i += 4) {
    Vec4 sums = sums_from(i, 3);
    if (into == Into::add) sums += load_as<Vec4>(from + i);
    memcpy(to + i, &sums, sizeof(sums));
  }
  if (i == F) return;
  const Vec4 sums = sums_from(i, F - 1 - i);
  for (int r = 0; i + r < F; r++) to[i + r] = into == Into::add ? from[i + r] + sums[r] : sums[r];
}

// to[i] = the sum of the first n entries of row i of tile[F x BLOCK] (+ from[i]).
void sum_rows(const float* from, float* to, const float* tile, int F, int n, Into into) {
  const auto sum_of = [&](auto counted) {
    sum_lanes(from, to, F, into, [&](int i) {
      Vec sum = counted(0, load(tile + i * BLOCK));
      for (int j = LANES; j < BLOCK; j += LANES) sum += counted(j, load(tile + i * BLOCK + j));
      return sum;
    });
  };
  if (n == BLOCK) return sum_of([](int, Vec v) { return v; });
  sum_of([=](int j, Vec v) { return select(lane_index() < splat_int(n - j), v, Vec{}); });
}

// fold_tile() of pairs. The last key of an odd number shares its words with a key that stays out:
// it comes in by itself.
void fold_pairs(const float* phi, const float* v, int n, int F, int ld, Into into, StateRows from,
                StateRows to) {
#ifdef LOL_PAIRS
  const Term even = {n / 2 * 2, rows(phi, BLOCK / 2), v, ld, Skip::none, nullptr};
  gemm(Format::bf16_pairs, F, ld, &even, 1, to.kv, ld, into, {nullptr, n % 2 ? nullptr : to.pairs});
  static_assert(BLOCK == 2 * LANES, "a row of pairs is one vector");
  const Vec ones = pair(splat(1.0f), splat(1.0f));
  const VecI key = 2 * lane_index();
  const auto sum_of = [&](auto counted) {
    sum_lanes(from.ksum, to.ksum, F, into,
              [&](int i) { return add_dot(Vec{}, counted(load(phi + i * LANES)), ones); });
  };
  if (n == BLOCK) {
    sum_of([](Vec row) { return row; });
  } else {
    // An odd last key comes without the second half of its word.
    sum_of([=](Vec row) {
      const Vec last = select(key < splat_int(n), without_second(row), Vec{});
      return select(key + 1 < splat_int(n), row, last);
    });
  }
  for (int i = 0; n % 2 && i < F; i++) {
    const uint16_t* row = (const uint16_t*)(phi + i * LANES);
    const float* last = v + n / 2 * ld;
    const Vec weight = splat(bf16_value(row[n - 1]));
    for (int j = 0; j < ld; j += LANES)
      store(to.kv + i * ld + j, load(to.kv + i * ld + j) + weight * first_of(load(last + j)));
  }
  if (n % 2 && to.pairs) pair_rows(to.pairs, to.kv, F, ld);
#else
  (void)phi, (void)v, (void)n, (void)F, (void)ld, (void)into, (void)from, (void)to;
#endif
}

// to += a[F] tile[F x BLOCK], the tile in pairs along F.
void add_products_of_pairs(float* to, const float* a, const float* tile, int F) {
#ifdef LOL_PAIRS
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec first = load(to + c), second = {};
    const float* word = tile + c;
    int i = 0;
    for (; i + 1 < F; i += 2, word += BLOCK) {
      first += a[i] * first_of(load(word));
      second += a[i + 1] * second_of(load(word));
    }
    if (i < F) first += a[i] * first_of(load(word));
    store(to + c, first + second);
  }
#else
  (void)to, (void)a, (void)tile, (void)F;
#endif
}

}  // namespace

void fold_tile(Format format, Operand phi, const float* v, int n, int F, int ld, Into into,
               StateRows from, StateRows to) {
  if (format != Format::f32) return fold_pairs(phi.data, v, n, F, ld, into, from, to);
  const Term keys = {n, phi, v, ld, Skip::none, nullptr};
  gemm(format, F, ld, &keys, 1, to.kv, ld, into, {from.kv, nullptr});
  sum_rows(from.ksum, to.ksum, phi.data, F, n, into);
}

void add_products(Format format, float* to, const float* a, const float* tile, int F) {
  if (format != Format::f32) return add_products_of_pairs(to, a, tile, F);
  // Four chains hide the latency of an FMA.
  for (int c = 0; c < BLOCK; c += LANES) {
    Vec sum[4] = {load(to + c)};
    int i = 0;
    for (; i + 4 <= F; i += 4) {
      for (int r = 0; r < 4; r++) sum[r] += a[i + r] * load(tile + (i + r) * BLOCK + c);
    }
    for (; i < F; i++) sum[0] += a[i] * load(tile + i * BLOCK + c);
    store(to + c, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

void add_weighted_rows(Format format, float* to, const float* tile, const float* weights, int F) {
  const auto add = [&](auto entries_at) {
    sum_lanes(to, to, F, Into::add, [&](int i) {
      Vec sum = {};
      for (int c = 0; c < BLOCK; c += LANES) sum += entries_at(i * BLOCK + c) * load(weights + c);
      return sum;
    });
  };
  if (format == Format::f32) return add([&](int at) { return load(tile + at); });
  add([&](int at) { return from_bf16((const uint16_t*)tile + at); });
}

void add_what_rounding_took(float* to, const float* from, const float* a, const uint16_t* rounded,
                            const float* b, int F, int ld) {
  sum_lanes(from, to, F, Into::add, [&](int i) {
    Vec took = {};
    for (int j = 0; j < ld; j += LANES)
      took += (load(a + i * ld + j) - from_bf16(rounded + i * ld + j)) * load(b + j);
    return took;
  });
}

}  // namespace LOL_ISA
}  // namespace lol
