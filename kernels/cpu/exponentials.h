// Exponentials and the logarithm of vectors, by polynomials whose errors tests/simd holds over the
// whole range of floats, every 31st of them.
#pragma once
#include "simd.h"

namespace lol {
namespace LOL_ISA {

// Rounds to the nearest integer by pushing the fraction out of the mantissa; the integer, plus a
// float's bias, is in the low bits of the result.
constexpr float ROUND_MAGIC = 12582912.0f + 127.0f;  // 1.5 * 2^23 + 127
constexpr float LOG2_E = 1.44269504f;

// x = n log(base) + r, n whole; `exponent` is n as the two below take it.
struct Reduced {
  Vec exponent, r;
};
// p 2^n, -126 <= n <= 127, and p 2^-n, |n| <= 126.
#ifdef __AVX512F__
// An exponent is n or less than 1 above it. On AMD's Zen 4 these instructions leave the units that
// multiply to others.
static inline Vec times_power_of_2(Vec p, Vec exponent) {
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)exponent);
}
static inline Vec over_power_of_2(Vec p, Vec exponent) { return times_power_of_2(p, -exponent); }
static inline Vec exponent_of(Vec rounded) { return rounded - ROUND_MAGIC; }
// To base 2, 0 <= r <= 1.
static inline Reduced floored(Vec x) {
  return {x, (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
#else
// An exponent is n + ROUND_MAGIC. A product, since adding to p's exponent would make a number of a
// NaN with low bits.
static inline Vec times_power_of_2(Vec p, Vec exponent) { return p * (Vec)((VecI)exponent << 23); }
static inline Vec over_power_of_2(Vec p, Vec exponent) {
  return p * (Vec)(splat_int(2 * 127 << 23) - ((VecI)exponent << 23));
}
static inline Vec exponent_of(Vec rounded) { return rounded; }
static inline Reduced floored(Vec x) {
  const Vec rounded = (x - 0.5f) + ROUND_MAGIC;
  return {rounded, x - (rounded - ROUND_MAGIC)};
}
#endif
// To base e, |r| <= ln(2) / 2.
static inline Reduced reduced(Vec x) {
  const Vec rounded = x * LOG2_E + ROUND_MAGIC, n = rounded - ROUND_MAGIC;
  // ln 2 in two parts, the first with trailing zeros, so that n * hi is exact.
  return {exponent_of(rounded), (x - n * 0.693359375f) + n * 2.12194440e-4f};
}
// e^r = 1 + r + r^2 p(r), p of degree 4 (minimax, 1e-8).
constexpr float EXP_TERMS[] = {0.5f, 0.16666578f, 4.1666556e-2f, 8.3631732e-3f, 1.3926176e-3f};

// e^x to 1.5 ulp: 2^n e^r. Below -87.33 the result stays at 1.01 * 2^-126 instead of leaving the
// normal range; above 88.37 it stays at e^88.37; NaN stays NaN. exp_within is for x that are known
// to lie between, exp_below_one for those that are not above; past that they return anything.
static inline Vec exp_within(Vec x) {
  const Reduced at = reduced(x);
  Vec p = splat(EXP_TERMS[4]);
  for (int i = 3; i >= 0; i--) p = p * at.r + EXP_TERMS[i];
  p = p * at.r + 1.0f;
  return times_power_of_2(p * at.r + 1.0f, at.exponent);
}
static inline Vec above_least_exponent(Vec x) { return max(x, splat(-87.33f)); }
static inline Vec exp_below_one(Vec x) { return exp_within(above_least_exponent(x)); }
static inline Vec exp(Vec x) { return exp_below_one(min(x, splat(88.37f))); }
// The largest number below 1. Where a maximum is told by equality, what comes close to it, and
// whose exponential rounds to 1, must not pass for it.
constexpr float BELOW_ONE = 1.0f - 0x1p-24f;

// e^x and e^-x to 2.5 ulp each, |x| <= 87: even and odd powers of r, added and subtracted, which is
// less than a reciprocal.
struct BothWays {
  Vec up, down;
};
static inline BothWays exp_both_ways_within(Vec x) {
  const Reduced at = reduced(x);
  const Vec square = at.r * at.r;
  Vec even = EXP_TERMS[4] * square + EXP_TERMS[2];
  even = even * square + EXP_TERMS[0];
  even = even * square + 1.0f;
  const Vec odd = (EXP_TERMS[3] * square + EXP_TERMS[1]) * square + 1.0f;
  return {times_power_of_2(even + odd * at.r, at.exponent),
          over_power_of_2(even - odd * at.r, at.exponent)};
}

// e^x to 9e-5, for what is then rounded to bf16, which is off by up to 3.9e-3: 2^t = 2^n p(t - n),
// p of degree 3 (minimax with p(0) = 1, so that e^0 is 1 and the maximum of a feature map is told
// by equality).
static inline Vec exp_for_bf16_within(Vec x) {
  const Reduced at = floored(x * LOG2_E);
  Vec p = splat(7.7067050e-2f);
  p = p * at.r + 0.22764498f;
  p = p * at.r + 0.69511679f;
  p = p * at.r + 1.0f;
  return times_power_of_2(p, at.exponent);
}
static inline Vec exp_below_one_for_bf16(Vec x) {
  return exp_for_bf16_within(above_least_exponent(x));
}
static inline BothWays exp_both_ways_for_bf16_within(Vec x) {
  const Vec up = exp_for_bf16_within(x);
  return {up, reciprocal_for_bf16(up)};
}

// ln x for normal positive x, to 1e-7 absolute plus 2 ulp: x = 2^n (1 + f), 1 + f in [sqrt(1/2),
// sqrt(2)).
static inline Vec log(Vec x) {
  const VecI bits = (VecI)x - splat_int(0x3f3504f3);  // sqrt(1/2)
  const VecI n = bits >> 23;
  const Vec f = (Vec)((VecI)x - (n << 23)) - 1.0f;
  Vec p = splat(0.090487845f);
  p = p * f - 0.14030892f;
  p = p * f + 0.147039f;
  p = p * f - 0.16602719f;
  p = p * f + 0.19984223f;
  p = p * f - 0.25000703f;
  p = p * f + 0.33333415f;
  const Vec e = __builtin_convertvector(n, Vec);
  return (e * 0.693359375f + f) + ((p * f - 0.5f) * f * f - e * 2.12194440e-4f);
}

}  // namespace LOL_ISA
}  // namespace lol
