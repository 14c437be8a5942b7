#include "features.h"

namespace lol {
namespace LOL_ISA {
namespace {

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

// z[f x n] (+)= x W of n tokens of a tile, by the parts [from, to) of W.
void add_product(const FeatureMap& map, int from, int to, const float* x, int n, float* z,
                 Into into) {
  Term terms[MOST_WEIGHT_PARTS];
  for (int i = from; i < to; i++) {
    const float* part = map.weight + i * paired_weight_size(map.D, map.f);
    terms[i - from] = {map.D, by_feature(map, part), x, BLOCK, Skip::none, nullptr};
  }
  gemm(map.format, map.f, n, terms, to - from, z, BLOCK, into);
}

// Every reduction here runs over the rows of a tile, for LANES tokens at once.

inline Vec largest_magnitude(const float* z, int f) {
  // Two chains, which wait for one another half as long.
  Vec magnitudes[2] = {max_magnitude(Vec{}, load(z + (f - 1) * BLOCK)), Vec{}};
  for (int i = 0; i + 1 < f; i += 2) {
    for (int r = 0; r < 2; r++)
      magnitudes[r] = max_magnitude(magnitudes[r], load(z + (i + r) * BLOCK));
  }
  return max(magnitudes[0], magnitudes[1]);
}

// The parts of W that are not always taken: a tile takes them once, from the first LANES tokens on
// for which the others will not do. What has become features before keeps them.
class OtherParts {
 public:
  OtherParts(const FeatureMap& map, const float* x, float* z)
      : map(map), z(z), x_(x), taken_(map.parts.always == map.parts.all) {
#ifdef LOL_PAIRS
    if (taken_) return;
    Vec norm2[VECTORS] = {};
    for (int i = 0; i < words(map.format, map.D); i++) {
      LOL_UNROLL for (int r = 0; r < VECTORS; r++) {
        const Vec word = load(x + i * BLOCK + r * LANES);
        norm2[r] = add_dot(norm2[r], word, word);
      }
    }
    for (int r = 0; r < VECTORS; r++) spread2_[r] = map.spread2 * norm2[r];
#endif
  }
  const FeatureMap& map;
  float* const z;

  void take_for(int t) {
    if (!taken_) (void)magnitude_with_them(t);
  }
  // The largest |z| of LANES tokens, after the parts that they need are in it.
  Vec magnitude_with_them(int t) {
    const Vec magnitude = largest_magnitude(z + t, map.f);
    if (taken_ || others_will_do(t, magnitude)) return magnitude;
    add_product(map, map.parts.always, map.parts.all, x_ + t, BLOCK - t, z + t, Into::add);
    taken_ = true;
    return largest_magnitude(z + t, map.f);
  }

 private:
  static constexpr int VECTORS = BLOCK / LANES;
  bool others_will_do(int t, Vec magnitude) const {
    constexpr float MOST = ONE_PART_SPREAD * ONE_PART_SPREAD;
    const Vec spread2 = spread2_[t / LANES];
    if (map.activation == LOL_SOFTMAX)
      return all_at_most(magnitude, ONE_PART) && all_at_most(spread2, MOST);
    // Features that grow with z are off by no more of themselves where z is large.
    const Vec size = map.activation == LOL_ELU1 ? max(magnitude, splat(1.0f)) : magnitude;
    return all_at_most(spread2 - MOST * size * size, 0.0f);
  }
  const float* x_;
  bool taken_;
  Vec spread2_[VECTORS];
};

// Of LANES tokens: the sums of exponentials, and whether no z was large.
struct Exponentials {
  BothWays sums;
  bool of_small;
};

// exp(z - max z) in place of z and exp(min z - z) in `upper`, which is null for one side: 1 at the
// maximum, below it elsewhere.
template <Format format>
inline Exponentials exponentials_below_one(float* z, float* upper, int f) {
  Vec top = load(z), bottom = top;
  for (int i = 1; i < f; i++) {
    const Vec x = load(z + i * BLOCK);
    top = max(top, x);
    bottom = min(bottom, x);
  }
  // An infinite z is no maximum to measure others by: all of such a token become NaN.
  top += top - top;
  bottom += bottom - bottom;
  BothWays sums = {};
  for (int i = 0; i < f; i++) {
    const Vec x = load(z + i * BLOCK);
    const auto from = [=](Vec most, Vec exponent) {
      return select(x == most, splat(1.0f),
                    min(exp_below_one_for<format>(exponent), splat(BELOW_ONE)));
    };
    const Vec e = from(top, x - top);
    sums.up += e;
    store(z + i * BLOCK, e);
    if (!upper) continue;
    const Vec u = from(bottom, bottom - x);
    sums.down += u;
    store(upper + i * BLOCK, u);
  }
  return {sums, false};
}

// The same, but for factors that cancel in a softmax: e^z and e^-z, with no need of a maximum,
// where none of LANES tokens has a z too large for that, as is mostly so.
template <Format format>
inline Exponentials exponentials_of_softmax(OtherParts& others, int t, float* upper) {
  const int f = others.map.f;
  float* z = others.z + t;
  const Vec magnitude = others.magnitude_with_them(t);
  if (!all_at_most(magnitude, UNSHIFTED)) return exponentials_below_one<format>(z, upper, f);
  BothWays sums = {};
  for (int i = 0; i < f; i++) {
    const Vec x = load(z + i * BLOCK);
    const BothWays e =
        upper ? exp_both_ways_within_for<format>(x) : BothWays{exp_within_for<format>(x), Vec{}};
    sums.up += e.up;
    store(z + i * BLOCK, e.up);
    if (!upper) continue;
    sums.down += e.down;
    store(upper + i * BLOCK, e.down);
  }
  return {sums, all_at_most(magnitude, SMALL)};
}

// Exponentials of z [F x BLOCK], of which f rows of the LANES tokens from t on are given and lost,
// and if two-sided of -z behind them.
template <Format format>
inline Exponentials exponentials_in(OtherParts& others, int t) {
  const FeatureMap& map = others.map;
  float* z = others.z + t;
  float* upper = map.two_sided ? z + map.f * BLOCK : nullptr;
  return map.activation == LOL_SOFTMAX ? exponentials_of_softmax<format>(others, t, upper)
                                       : exponentials_below_one<format>(z, upper, map.f);
}
inline Exponentials exponentials(OtherParts& others, int t) {
  return others.map.format == Format::f32 ? exponentials_in<Format::f32>(others, t)
                                          : exponentials_in<Format::bf16_pairs>(others, t);
}

// What they are as features: divided by their sums if the map is a softmax, and clamped.
template <class Write>
inline void write_features(const FeatureMap& map, const float* of, const Exponentials& e,
                           Write write) {
  const int f = map.f;
  const bool normalize = map.activation == LOL_SOFTMAX;
  const auto write_side = [&](int begin, Vec side_sum, auto clamped) {
    const Vec factor = normalize ? 1.0f / side_sum : splat(1.0f);
    const auto feature = [&](int i) { return clamped(load(of + i * BLOCK) * factor); };
    int i = begin;
    for (; i + 2 <= begin + f; i += 2) write.two(i, feature(i), feature(i + 1));
    if (i < begin + f) write.one(i, feature(i));
  };
  const auto write_all = [&](auto clamped) {
    write_side(0, e.sums.up, clamped);
    if (map.two_sided) write_side(f, e.sums.down, clamped);
  };
  if (e.of_small && map.eps <= LEAST_OF_SMALL) return write_all([](Vec phi) { return phi; });
  const Vec floor = splat(map.eps);
  write_all([=](Vec phi) { return max(phi, floor); });
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
    const Halves both = halves(a, b);
    store(along_features + i / 2 * BLOCK, pairs_of(both));
    if (!along_tokens) return;
    store_first_half(along_tokens + i * BLOCK, both);
    store_second_half(along_tokens + (i + 1) * BLOCK, both);
  }
};
#endif

}  // namespace

bool takes_pairs(const lol_features& features) {
#ifdef LOL_PAIRS
  return !has_map(features) || features.activation != LOL_FAVOR;
#else
  (void)features;
  return false;
#endif
}

#ifdef LOL_PAIRS
namespace {
float largest_norm2_of_columns(const FeatureMap& map) {
  Vec largest = {};
  for (int j = 0; j < map.f; j += LANES) {
    Vec norm2 = {};
    for (int d = 0; d < map.D; d++) {
      const Vec w = load_first(map.weight + d * map.f + j, map.f - j);
      norm2 += w * w;
    }
    largest = max(norm2, largest);
  }
  float of_all = 0.0f;
  for (int l = 0; l < LANES; l++) of_all = largest[l] > of_all ? largest[l] : of_all;
  return of_all;
}
}  // namespace
#endif

FeatureMap with_paired_weight(FeatureMap map, float* to, WeightParts parts) {
  if (!map.weight) return map;
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
      for (int i = 0; i < parts.all; i++) {
        const Vec word = pair(first, second);
        keep(to + i * paired_weight_size(map.D, map.f), d / 2, j, word);
        first -= first_of(word);
        second -= second_of(word);
      }
    }
  }
  map.spread2 = largest_norm2_of_columns(map) / (float)map.D;
  map.weight = to;
  map.format = Format::bf16_pairs;
  map.parts = parts;
#else
  (void)to, (void)parts;
#endif
  return map;
}

namespace {

// z += x, where f = D.
void add_tokens(const FeatureMap& map, const float* x, float* z) {
  const auto add = [](float* to, Vec of) { store(to, load(to) + of); };
  if (map.format == Format::f32) {
    for (int t = 0; t < map.f * BLOCK; t += LANES) add(z + t, load(x + t));
    return;
  }
#ifdef LOL_PAIRS
  for (int i = 0; i < map.f; i += 2, x += BLOCK, z += 2 * BLOCK) {
    for (int t = 0; t < BLOCK; t += LANES) {
      const Vec word = load(x + t);
      add(z + t, first_of(word));
      if (i + 1 < map.f) add(z + BLOCK + t, second_of(word));
    }
  }
#endif
}

// z = x W + b (+ x) [f x BLOCK], by those parts of W that are always taken.
void project(const FeatureMap& map, const float* x, float* z) {
  add_product(map, 0, map.parts.always, x, BLOCK, z, Into::set);
  for (int i = 0; map.bias && i < map.f; i++) {
    for (int t = i * BLOCK; t < (i + 1) * BLOCK; t += LANES)
      store(z + t, load(z + t) + map.bias[i]);
  }
  if (map.skip) add_tokens(map, x, z);
}

}  // namespace

void features_forward(const FeatureMap& map, const float* x, float* phi) {
  if (!map.weight) {
    memcpy(phi, x, sizeof(float) * map.D * BLOCK);
    return;
  }
  project(map, x, phi);
  OtherParts others(map, x, phi);
  for (int t = 0; t < BLOCK; t += LANES) {
    float* z = phi + t;
    if (is_exponential(map.activation)) {
      write_features(map, z, exponentials(others, t), InFloats{z});
      continue;
    }
    others.take_for(t);
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
    OtherParts others(map, x, scratch);
    // Those of all tokens first: what divides by a sum waits for its last term.
    Exponentials of_tokens[BLOCK / LANES];
    for (int t = 0; t < BLOCK; t += LANES) of_tokens[t / LANES] = exponentials(others, t);
    for (int t = 0; t < BLOCK; t += LANES) {
      uint16_t* along_tokens = to.along_tokens ? (uint16_t*)to.along_tokens + t : nullptr;
      write_features(map, scratch + t, of_tokens[t / LANES],
                     InPairs{to.along_features + t, along_tokens});
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
