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
  if (two_sided && normalize && all_at_most(half, 0.5f * WIDE)) {
    const Vec middle = bottom + half;
    for (int i = 0; i < f; i++) {
      const BothWays e = exp_both_ways_within_for<format>(load(z + i * BLOCK) - middle);
      sum += e.up;
      upper_sum += e.down;
      store(z + i * BLOCK, e.up);
      store(upper + i * BLOCK, e.down);
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

}  // namespace LOL_ISA
}  // namespace lol
