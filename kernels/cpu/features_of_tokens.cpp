// The feature map of tokens that are rows, lanes along features (features.h).
#include "features.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Of one token, over its features in each lane.
struct Sums {
  Vec side, upper;
};

// Writes exp(z - max z) into `side` and, if two-sided, exp(min z - z) into `upper`.
template <bool two_sided>
Sums exponentials_below_one(const float* z, float* side, float* upper, int f) {
  const auto inside = [=](int i) { return lane_index() < splat_int(f - i); };
  const Vec first = splat(z[0]);
  Vec top = first, bottom = first;
  for (int i = 0; i < f; i += LANES) {
    const Vec x = select(inside(i), load(z + i), first);
    top = max(top, x);
    bottom = min(bottom, x);
  }
  const Vec most = splat(horizontal_max(top)), least = splat(-horizontal_max(-bottom));
  Sums sums = {};
  for (int i = 0; i < f; i += LANES) {
    const auto term = [&](float* to, Vec exponent) {
      const Vec e = exp_below_one(exponent);
      store(to + i, e);
      return select(inside(i), e, Vec{});
    };
    const Vec x = load(z + i);
    sums.side += term(side, x - most);
    if (two_sided) sums.upper += term(upper, least - x);
  }
  return sums;
}

// The same, but for factors that cancel in a softmax: e^z and e^-z, with no need of a maximum over
// lanes, where z is not too large for that. Behind z's f numbers are zeros, up to a whole vector.
template <bool two_sided>
inline Sums exponentials_of_token(const float* z, float* side, float* upper, int f,
                                  bool normalize) {
  Vec magnitude = {};
  for (int i = 0; i < f; i += LANES) magnitude = max_magnitude(magnitude, load(z + i));
  if (!normalize || !all_at_most(magnitude, UNSHIFTED))
    return exponentials_below_one<two_sided>(z, side, upper, f);
  Sums sums = {};
  const auto vector = [&](int i, auto inside) {
    const Vec x = load(z + i);
    const BothWays e = two_sided ? exp_both_ways_within(x) : BothWays{exp_within(x), Vec{}};
    store(side + i, e.up);
    sums.side += inside(e.up);
    if (!two_sided) return;
    store(upper + i, e.down);
    sums.upper += inside(e.down);
  };
  int i = 0;
  for (; i + LANES <= f; i += LANES) vector(i, [](Vec v) { return v; });
  const VecI first = lane_index() < splat_int(f - i);
  if (i < f) vector(i, [=](Vec v) { return select(first, v, Vec{}); });
  return sums;
}

// Features of some tokens but for a factor of each side and the clamp.
struct Unscaled {
  float *terms, *factors;  // [tokens x sides x ld], [tokens x sides] up to a whole four
  float least;
};
inline Vec scaled(Vec terms, Vec factor, Vec least) { return max(terms * factor, least); }

// Those on their way past the caches, a vector between two steps of the next product: where they
// follow one another, they wait for line buffers, of which a core has some 16.
struct Unwritten {
  const float *terms, *factor;
  float least;
  float* to;
  int64_t vectors, of_side, left_of_side;

  bool any() const { return vectors > 0; }
  void write_one() {
    stream(to, scaled(load(terms), splat(*factor), splat(least)));
    terms += LANES;
    to += LANES;
    vectors--;
    if (--left_of_side > 0) return;
    left_of_side = of_side;
    factor++;
  }
};

// z [n x ld] = x W for `vectors` vectors of features from W on, whose rows are ldw apart. Each of
// the n * vectors sums is one chain in registers, or two of even and odd d.
template <int n, int vectors, int chains>
__attribute__((noinline)) void project(const float* const* x, const float* weight, int64_t ldw,
                                       int D, float* z, int ld, Unwritten& before) {
  const float* row[n];
  Vec sums[chains][n][vectors];
  LOL_UNROLL for (int r = 0; r < n; r++) {
    row[r] = x[r];
    LOL_UNROLL for (int c = 0; c < chains; c++) {
      LOL_UNROLL for (int i = 0; i < vectors; i++) sums[c][r][i] = Vec{};
    }
  }
  int d = 0;
  for (; d + chains <= D; d += chains) {
    LOL_UNROLL for (int c = 0; c < chains; c++, weight += ldw) {
      Vec w[vectors];
      LOL_UNROLL for (int i = 0; i < vectors; i++) w[i] = load(weight + i * LANES);
      LOL_UNROLL for (int r = 0; r < n; r++) {
        const Vec at = splat(row[r][d + c]);
        LOL_UNROLL for (int i = 0; i < vectors; i++) sums[c][r][i] += at * w[i];
      }
    }
    if (before.any()) before.write_one();
  }
  LOL_UNROLL for (int r = 0; r < n; r++) {
    LOL_UNROLL for (int i = 0; i < vectors; i++) {
      Vec sum = sums[0][r][i];
      if (chains > 1 && d < D) sum += row[r][d] * load(weight + i * LANES);
      if (chains > 1) sum += sums[chains - 1][r][i];
      store(z + r * ld + i * LANES, sum);
    }
  }
}

// The same for all whole vectors of features, as many at once as there are registers for; returns
// how many features they have.
template <int n, int chains>
inline int project(const FeatureMap& map, const float* const* x, const float* weight, int64_t ldw,
                   float* z, int ld, Unwritten& before) {
  constexpr int most = n > 1 && LANES < 16 ? 2 : 4;
  int j = 0;
  const auto while_there_are = [&](auto run, int vectors) {
    for (; j + vectors * LANES <= ldw; j += vectors * LANES)
      run(x, weight + j, ldw, map.D, z + j, ld, before);
  };
  while_there_are(project<n, most, chains>, most);
  if (most > 2) while_there_are(project<n, 2, chains>, 2);
  while_there_are(project<n, 1, chains>, 1);
  return j;
}

// Rows of features, or null.
struct Rows {
  float* phi;
  int64_t stride;
};

// Writes the features of n tokens. known_f: f, or 0 for any; loops whose length the compiler knows
// save 5 % of all.
template <int n, int sides, int known_f>
inline void write(const FeatureMap& map, const Unscaled& from, int ld, Rows to) {
  const int f = known_f ? known_f : map.f;
  const Vec least = splat(from.least);
  for (int r = 0; r < n * sides; r++) {
    const float* terms = from.terms + r * ld;
    float* phi = to.phi + r / sides * to.stride + r % sides * f;
    const Vec factor = splat(from.factors[r]);
    const auto feature = [&](int i) { return scaled(load(terms + i), factor, least); };
    int i = 0;
    for (; i + LANES <= f; i += LANES) store(phi + i, feature(i));
    if (i < f) store_first(phi + i, feature(i), f - i);
  }
}

// The features of n tokens from their z [n x ld], also written `to` rows if there are any. `ahead`
// of each x, unless 0, is a row that is wanted soon.
template <int n, bool two_sided, int known_f>
inline void exponentials_of_tokens(const FeatureMap& map, const float* const* x, int64_t ahead,
                                   const float* z, int ld, const Unscaled& features, Rows to) {
  const int f = known_f ? known_f : map.f;
  const bool normalize = map.activation == LOL_SOFTMAX;
  constexpr int sides = two_sided ? 2 : 1, padded_sums = (n * sides + 3) / 4 * 4;
  Vec sums[padded_sums];
  for (int r = 0; r < n; r++) {
    // Here nothing else is on its way to or from memory.
    for (int d = 0; ahead && d < map.D; d += 16) __builtin_prefetch(x[r] + ahead + d);
    float* terms = features.terms + sides * r * ld;
    const Sums s = exponentials_of_token<two_sided>(z + r * ld, terms, terms + ld, f, normalize);
    sums[sides * r] = s.side;
    if (two_sided) sums[sides * r + 1] = s.upper;
  }
  for (int r = n * sides; r < padded_sums; r++) sums[r] = Vec{};
  for (int r = 0; r < padded_sums; r += 4) {
    const Vec4 four = normalize ? 1.0f / sums_of_4(sums + r) : Vec4{1, 1, 1, 1};
    memcpy(features.factors + r, &four, sizeof(four));
  }
  if (to.phi) write<n, sides, known_f>(map, features, ld, to);
}

template <int n>
inline void activate(const FeatureMap& map, const float* const* x, int64_t ahead, float* z, int ld,
                     Unscaled& features, Rows to) {
  const int f = map.f;
  for (int r = 0; r < n; r++) {
    for (int j = 0; map.bias && j < f; j++) z[r * ld + j] += map.bias[j];
    for (int j = 0; map.skip && j < f; j++) z[r * ld + j] += x[r][j];
  }
  if (is_exponential(map.activation)) {
    features.least = map.eps;
    const auto run = !map.two_sided ? exponentials_of_tokens<n, false, 0>
                     : f == 64      ? exponentials_of_tokens<n, true, 64>
                                    : exponentials_of_tokens<n, true, 0>;
    return run(map, x, ahead, z, ld, features, to);
  }
  features.least = -INFINITY;
  for (int r = 0; r < n; r++) {
    const float half_norm = map.activation == LOL_FAVOR ? 0.5f * dot(x[r], x[r], map.D) : 0.0f;
    for (int j = 0; j < f; j += LANES)
      store(features.terms + r * ld + j, activated(map, load(z + r * ld + j), splat(half_norm)));
    features.factors[r] = 1.0f;
  }
  if (to.phi) write<n, 1, 0>(map, features, ld, to);
}

}  // namespace

void features_of_token(const FeatureMap& map, const float* x, float* phi) {
  const int f = map.f, ld = padded(f);
  alignas(64) float z[MAX_FEATURES + LANES], terms[2 * (MAX_FEATURES + LANES)], factors[4];
  Unscaled features = {terms, factors, 0.0f};
  Unwritten none = {};
  const int j = project<1, 2>(map, &x, map.weight, f, z, ld, none);
  fill(z + j, ld - j, 0.0f);
  for (int d = 0; j < f && d < map.D; d++) {
    for (int i = j; i < f; i++) z[i] += x[d] * map.weight[d * f + i];
  }
  activate<1>(map, &x, 0, z, ld, features, {phi, 0});
}

void features_of_tokens(const FeatureMap& map, const TokenRows& at, float* scratch) {
  const int ld = padded(map.f), size = TOKENS_AT_ONCE * ld;
  float *z = scratch, *terms = z + size, *whole_rows = terms + 2 * size;
  float factors[2 * TOKENS_AT_ONCE];
  Unscaled features = {terms, factors, 0.0f};
  const float* weight = map.weight;
  if (ld != map.f) {
    for (int d = 0; d < map.D; d++)
      load_row(whole_rows + d * ld, (const char*)(weight + d * map.f), map.f, LOL_F32);
    weight = whole_rows;
  }
  const bool streamed =
      at.streamed && ld == map.f && (uintptr_t)at.phi % sizeof(Vec) == 0 && at.phi_stride == map.F;
  Unwritten before = {};
  const auto tokens = [&](auto project_some, auto activate_some, int64_t i, int n) {
    const float* x[TOKENS_AT_ONCE];
    for (int r = 0; r < n; r++) x[r] = at.x + (i + r) * at.x_stride;
    project_some(map, x, weight, ld, z, ld, before);
    while (before.any()) before.write_one();
    float* to = at.phi + i * at.phi_stride;
    const int64_t ahead = i + 2 * n <= at.n ? n * at.x_stride : 0;
    activate_some(map, x, ahead, z, ld, features, Rows{streamed ? nullptr : to, at.phi_stride});
    const int64_t of_side = ld / LANES;
    if (streamed)
      before = {terms, factors, features.least, to, (int64_t)n * map.F / LANES, of_side, of_side};
  };
  // The last ones one by one: a token's features are the same to the bit either way.
  int64_t i = 0;
  for (; i + TOKENS_AT_ONCE <= at.n; i += TOKENS_AT_ONCE)
    tokens(project<TOKENS_AT_ONCE, 1>, activate<TOKENS_AT_ONCE>, i, TOKENS_AT_ONCE);
  for (; i < at.n; i++) tokens(project<1, 1>, activate<1>, i, 1);
  while (before.any()) before.write_one();
}

}  // namespace LOL_ISA
}  // namespace lol
