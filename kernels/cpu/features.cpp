#include "features.h"

namespace lol {
namespace LOL_ISA {
namespace {

// Every reduction here runs over the rows of a tile, for LANES tokens at once.

// Writes exp(z - max z) and, if two-sided, exp(-(z - min z)) behind it, divided by their sums if
// the map is a softmax, and clamped. z [F x BLOCK], of which f rows of LANES are given, is lost.
//
// One exponential serves both sides of a softmax: with e = exp(z - c), c the middle of z's range,
// the other is 1 / e, and the factors exp(c - max z) and exp(min z - c) cancel. Where the range is
// so wide that e could leave the normal floats, each side takes its own exponential.
template <Format format, class Write>
inline void exponentials(const FeatureMap& map, float* z, Write write) {
  const int f = map.f;
  const bool two_sided = map.two_sided, normalize = map.activation == LOL_SOFTMAX;
  float* upper = z + f * BLOCK;
  // Two chains each, which wait for one another half as long.
  const Vec first = load(z), last = load(z + (f - 1) * BLOCK);
  Vec tops[2] = {first, last}, bottoms[2] = {first, last};
  for (int i = 1; i + 1 < f; i += 2) {
    for (int r = 0; r < 2; r++) {
      const Vec x = load(z + (i + r) * BLOCK);
      tops[r] = max(tops[r], x);
      bottoms[r] = min(bottoms[r], x);
    }
  }
  const Vec top = max(tops[0], tops[1]), bottom = min(bottoms[0], bottoms[1]);
  constexpr float WIDE = 160.0f;  // e^80 times MAX_FEATURES is finite, and so is its reciprocal
  const Vec half = 0.5f * (top - bottom);
  Vec sum = {}, upper_sum = {};
  if (two_sided && normalize && all(half <= splat(0.5f * WIDE))) {
    const Vec middle = bottom + half;
    for (int i = 0; i < f; i++) {
      const Vec e = exp_within_for<format>(load(z + i * BLOCK) - middle);
      const Vec u = reciprocal_for<format>(e);
      sum += e;
      upper_sum += u;
      store(z + i * BLOCK, e);
      store(upper + i * BLOCK, u);
    }
  } else {
    for (int i = 0; i < f; i++) {
      const Vec x = load(z + i * BLOCK), e = exp_for<format>(x - top);
      sum += e;
      store(z + i * BLOCK, e);
      if (!two_sided) continue;
      const Vec u = exp_for<format>(bottom - x);
      upper_sum += u;
      store(upper + i * BLOCK, u);
    }
  }
  const auto write_side = [&](int begin, Vec side_sum) {
    const Vec factor = normalize ? 1.0f / side_sum : splat(1.0f), floor = splat(map.eps);
    const auto feature = [&](int i) { return max(load(z + i * BLOCK) * factor, floor); };
    int i = begin;
    for (; i + 2 <= begin + f; i += 2) write.two(i, feature(i), feature(i + 1));
    if (i < begin + f) write.one(i, feature(i));
  };
  write_side(0, sum);
  if (two_sided) write_side(f, upper_sum);
}

// Features of LANES tokens, in fp32 [F x BLOCK],
struct InFloats {
  float* phi;
  void one(int i, Vec a) const { store(phi + i * BLOCK, a); }
  void two(int i, Vec a, Vec b) const {
    one(i, a);
    one(i + 1, b);
  }
};
#ifdef LOL_PAIRS
// or in pairs along F and, unless null, along tokens. f is even, so there is no odd one.
struct InPairs {
  float* along_features;
  uint16_t* along_tokens;
  void one(int, Vec) const { __builtin_unreachable(); }
  void two(int i, Vec a, Vec b) const {
    store(along_features + i / 2 * BLOCK, pair(a, b));
    if (!along_tokens) return;
    to_bf16(along_tokens + i * BLOCK, a);
    to_bf16(along_tokens + (i + 1) * BLOCK, b);
  }
};
#endif

// The first `count` lanes, where a row may end within a vector.
inline Vec load_first(const float* from, int count) {
  if (count >= LANES) return load(from);
  Vec v = {};
  memcpy(&v, from, sizeof(float) * (size_t)count);
  return v;
}
inline void store_first(float* to, Vec v, int count) {
  if (count >= LANES) return store(to, v);
  memcpy(to, &v, sizeof(float) * (size_t)count);
}

// Where weights in pairs have a row of words for each feature, not a column: only as rows does the
// matrix unit take left operands without a copy.
#ifdef LOL_MATRIX_UNIT
constexpr bool PAIRS_BY_FEATURE = true;
#else
constexpr bool PAIRS_BY_FEATURE = false;
#endif
inline Operand by_feature(const FeatureMap& map, const float* weight) {
  if (PAIRS_BY_FEATURE && map.format != Format::f32) return rows(weight, words(map.format, map.D));
  return transposed(weight, map.f);
}

}  // namespace

bool takes_pairs(const lol_features& features) {
#ifdef LOL_PAIRS
  return has_map(features) && !features.skip && features.activation != LOL_FAVOR;
#else
  (void)features;
  return false;
#endif
}

FeatureMap with_paired_weight(FeatureMap map, float* to, int parts) {
#ifdef LOL_PAIRS
  const int ld = words(Format::bf16_pairs, map.D);
  const auto keep = [&](float* part, int pair_of, int first, Vec word) {
    if (PAIRS_BY_FEATURE) {
      for (int l = 0; l < LANES && first + l < map.f; l++)
        part[(first + l) * ld + pair_of] = word[l];
    } else {
      store_first(part + pair_of * map.f + first, word, map.f - first);
    }
  };
  for (int d = 0; d < map.D; d += 2) {
    const float* row = map.weight + d * map.f;
    for (int j = 0; j < map.f; j += LANES) {
      Vec first = load_first(row + j, map.f - j);
      Vec second = d + 1 < map.D ? load_first(row + map.f + j, map.f - j) : Vec{};
      for (int i = 0; i < parts; i++) {
        const Vec word = pair(first, second);
        keep(to + i * paired_weight_size(map.D, map.f), d / 2, j, word);
        first -= first_of(word);
        second -= second_of(word);
      }
    }
  }
  map.weight = to;
  map.format = Format::bf16_pairs;
  map.parts = parts;
#else
  (void)to, (void)parts;
#endif
  return map;
}

namespace {

// What activations make of z, one entry at a time; favor's need |x|^2 / 2 for it.
inline Vec activated(const FeatureMap& map, Vec z, Vec half_norm) {
  if (map.activation == LOL_IDENTITY) return z;
  Vec y = z;  // relu's: eps is no less than 0
  if (map.activation == LOL_ELU1) y = select(z > Vec{}, z + 1.0f, exp(min(z, Vec{})));
  if (map.activation == LOL_FAVOR) y = exp(z - half_norm) * (1.0f / sqrtf((float)map.f));
  return max(y, splat(map.eps));
}

// z = x W + b (+ x) [f x BLOCK].
void project(const FeatureMap& map, const float* x, float* z) {
  Term terms[MOST_WEIGHT_PARTS];
  for (int i = 0; i < map.parts; i++) {
    const float* part = map.weight + i * paired_weight_size(map.D, map.f);
    terms[i] = {map.D, by_feature(map, part), x, BLOCK, Skip::none, nullptr};
  }
  gemm(map.format, map.f, BLOCK, terms, map.parts, z, BLOCK, Into::set);
  for (int i = 0; map.bias && i < map.f; i++) {
    for (int t = i * BLOCK; t < (i + 1) * BLOCK; t += LANES)
      store(z + t, load(z + t) + map.bias[i]);
  }
  for (int t = 0; map.skip && t < map.f * BLOCK; t += LANES)
    store(z + t, load(z + t) + load(x + t));
}

template <class Write>
inline void exponentials_in(const FeatureMap& map, float* z, Write write) {
  const auto run = map.format == Format::f32 ? exponentials<Format::f32, Write>
                                             : exponentials<Format::bf16_pairs, Write>;
  run(map, z, write);
}

}  // namespace

void features_forward(const FeatureMap& map, const float* x, float* phi) {
  if (!map.weight) {
    memcpy(phi, x, sizeof(float) * map.D * BLOCK);
    return;
  }
  project(map, x, phi);
  for (int t = 0; t < BLOCK; t += LANES) {
    float* z = phi + t;
    if (is_exponential(map.activation)) {
      exponentials_in(map, z, InFloats{z});
      continue;
    }
    Vec half_norm = {};
    for (int i = 0; map.activation == LOL_FAVOR && i < map.D; i++)
      half_norm += 0.5f * load(x + i * BLOCK + t) * load(x + i * BLOCK + t);
    for (int i = 0; i < map.f; i++)
      store(z + i * BLOCK, activated(map, load(z + i * BLOCK), half_norm));
  }
}

void features_in_pairs(const FeatureMap& map, const float* x, float factor, float* scratch,
                       FeaturePairs to) {
#ifdef LOL_PAIRS
  if (is_exponential(map.activation) && map.f % 2 == 0 && factor == 1.0f) {
    project(map, x, scratch);
    for (int t = 0; t < BLOCK; t += LANES) {
      uint16_t* along_tokens = to.along_tokens ? (uint16_t*)to.along_tokens + t : nullptr;
      exponentials_in(map, scratch + t, InPairs{to.along_features + t, along_tokens});
    }
    return;
  }
  features_forward(map, x, scratch);
  for (int i = 0; factor != 1.0f && i < map.F * BLOCK; i += LANES)
    store(scratch + i, factor * load(scratch + i));
  if (to.along_tokens) {
    pair_both_ways(to.along_features, to.along_tokens, scratch, map.F, BLOCK);
  } else {
    pair_rows(to.along_features, scratch, map.F, BLOCK);
  }
#else
  (void)map, (void)x, (void)factor, (void)scratch, (void)to;
#endif
}

namespace {

// One token's row of features, and whether exponentials go past the caches.
struct Row {
  float* phi;
  bool streamed;
};

// One side of a token, by the vector that begins at i: in memory,
struct InMemory {
  static constexpr int f = 0;  // any
  float* p;
  Vec get(int i) const { return load(p + i); }
  void set(int i, Vec v) { store(p + i, v); }
};
// or, for f = 4 LANES, in registers: both sides of 64 features leave AVX-512 enough for the rest.
struct InRegisters {
  static constexpr int f = 4 * LANES;
  Vec v[4];
  Vec get(int i) const { return v[i / LANES]; }
  void set(int i, Vec to) { v[i / LANES] = to; }
};

// As exponentials(), lanes along the f features of one token. z is in `side`, `upper` is the other
// side's. A softmax of z that stay within 40, as they mostly do, needs no shift, and so no maximum
// of all lanes: e^40 times MAX_FEATURES is finite, and so is its reciprocal.
template <bool two_sided, typename Side>
inline void exponentials_of_token(Side side, Side upper, Row to, int f, bool normalize, float eps) {
  const int last = ((Side::f ? Side::f : f) - 1) / LANES * LANES;
  const VecI in_last = lane_index() < splat_int(f - last);
  const auto inside = [&](int i, Vec v) {
    return Side::f || i < last ? v : select(in_last, v, Vec{});
  };
  if (!Side::f) side.set(last, select(in_last, side.get(last), splat(side.get(0)[0])));
  Vec top = side.get(0), bottom = top;
  for (int i = LANES; i <= last; i += LANES) {
    top = max(top, side.get(i));
    bottom = min(bottom, side.get(i));
  }
  Vec sum = {}, upper_sum = {};
  const auto exponentials_by = [&](auto exp_of, auto upper_of) {
    for (int i = 0; i <= last; i += LANES) {
      const Vec x = side.get(i), e = exp_of(x);
      sum += inside(i, e);
      side.set(i, e);
      if (!two_sided) continue;
      const Vec u = upper_of(x, e);
      upper_sum += inside(i, u);
      upper.set(i, u);
    }
  };
  if (normalize && all((top <= splat(40.0f)) & (bottom >= splat(-40.0f)))) {
    exponentials_by([](Vec x) { return exp_within(x); }, [](Vec, Vec e) { return reciprocal(e); });
  } else {
    const Vec most = splat(horizontal_max(top)), least = splat(-horizontal_max(-bottom));
    exponentials_by([&](Vec x) { return exp(x - most); },
                    [&](Vec x, Vec) { return exp(least - x); });
  }
  const auto write = [&](float* phi, const Side& from, Vec side_sum) {
    const float factor = normalize ? 1.0f / horizontal_sum(side_sum) : 1.0f;
    const auto scaled = [&](int i) { return max(from.get(i) * factor, splat(eps)); };
    if (to.streamed) {
      for (int i = 0; i <= last; i += LANES) stream(phi + i, scaled(i));
    } else {
      for (int i = 0; i < last; i += LANES) store(phi + i, scaled(i));
      store_first(phi + last, scaled(last), f - last);
    }
  };
  write(to.phi, side, sum);
  if (two_sided) write(to.phi + f, upper, upper_sum);
}

inline void exponentials_of_token(const FeatureMap& map, float* z, Row to) {
  const bool normalize = map.activation == LOL_SOFTMAX;
  if (map.two_sided && map.f == InRegisters::f) {
    InRegisters side, upper;
    for (int i = 0; i < InRegisters::f; i += LANES) side.set(i, load(z + i));
    return exponentials_of_token<true>(side, upper, to, map.f, normalize, map.eps);
  }
  float upper[MAX_FEATURES];
  const auto run = map.two_sided ? exponentials_of_token<true, InMemory>
                                 : exponentials_of_token<false, InMemory>;
  run({z}, {upper}, to, map.f, normalize, map.eps);
}

// phi[F] of x[D] and z = x W [padded(f)], which is lost; lanes along features.
inline void activate_token(const FeatureMap& map, const float* x, float* z, Row to) {
  const int f = map.f;
  for (int j = 0; map.bias && j < f; j++) z[j] += map.bias[j];
  for (int j = 0; map.skip && j < f; j++) z[j] += x[j];
  if (is_exponential(map.activation)) return exponentials_of_token(map, z, to);
  const float half_norm = map.activation == LOL_FAVOR ? 0.5f * dot(x, x, map.D) : 0.0f;
  for (int j = 0; j < f; j += LANES)
    store_first(to.phi + j, activated(map, load(z + j), splat(half_norm)), f - j);
}

}  // namespace

void features_of_token(const FeatureMap& map, const float* x, float* phi) {
  if (!map.weight) {
    memcpy(phi, x, sizeof(float) * map.D);
    return;
  }
  const int f = map.f;
  float z[MAX_FEATURES + LANES];
  // Eight chains of sums in registers, two for each of four vectors of z: enough to hide the
  // latency of an FMA.
  int j = 0;
  for (; j + 4 * LANES <= f; j += 4 * LANES) {
    Vec even[4] = {}, odd[4] = {};
    int d = 0;
    for (; d + 2 <= map.D; d += 2) {
      const float* w = map.weight + d * f + j;
      for (int i = 0; i < 4; i++) {
        even[i] += x[d] * load(w + i * LANES);
        odd[i] += x[d + 1] * load(w + f + i * LANES);
      }
    }
    for (int i = 0; i < 4; i++) {
      if (d < map.D) even[i] += x[d] * load(map.weight + d * f + j + i * LANES);
      store(z + j + i * LANES, even[i] + odd[i]);
    }
  }
  fill(z + j, padded(f) - j, 0.0f);
  for (int d = 0; j < f && d < map.D; d++) {
    for (int i = j; i < f; i++) z[i] += x[d] * map.weight[d * f + i];
  }
  activate_token(map, x, z, {phi, false});
}

void features_of_tokens(const FeatureMap& map, const TokenRows& at, float* scratch) {
  const int ld = padded(map.f);
  float *z = scratch, *whole_rows = z + BLOCK * ld;
  const float* weight = map.weight;
  if (ld != map.f) {
    for (int d = 0; d < map.D; d++)
      load_row(whole_rows + d * ld, (const char*)(weight + d * map.f), map.f, LOL_F32);
    weight = whole_rows;
  }
  gemm(at.n, ld, map.D, rows(at.x, at.x_stride), weight, ld, z, ld, Into::set);
  const bool streamed = at.streamed && ld == map.f && (uintptr_t)at.phi % sizeof(Vec) == 0 &&
                        at.phi_stride % LANES == 0;
  for (int i = 0; i < at.n; i++) {
    const float* x = at.x + i * at.x_stride;
    // One row at a time: what is asked for at once has to wait for line buffers.
    for (int d = 0; i < at.next && d < map.D; d += 16)
      __builtin_prefetch(x + at.n * at.x_stride + d);
    activate_token(map, x, z + i * ld, {at.phi + i * at.phi_stride, streamed});
  }
}

}  // namespace LOL_ISA
}  // namespace lol
