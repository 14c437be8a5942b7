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
// p 2^n for `rounded` = n + ROUND_MAGIC, -126 <= n <= 127. A product, since adding to p's exponent
// would make a number of a NaN with low bits.
static inline Vec times_power_of_2(Vec p, Vec rounded) { return p * (Vec)((VecI)rounded << 23); }
// p 2^-n, |n| <= 126.
static inline Vec over_power_of_2(Vec p, Vec rounded) {
  return p * (Vec)(splat_int(2 * 127 << 23) - ((VecI)rounded << 23));
}

// x = n ln 2 + r, n whole and |r| <= ln(2) / 2; `rounded` is n + ROUND_MAGIC.
struct Reduced {
  Vec rounded, r;
};
static inline Reduced reduced(Vec x) {
  const Vec rounded = x * LOG2_E + ROUND_MAGIC, n = rounded - ROUND_MAGIC;
  // ln 2 in two parts, the first with trailing zeros, so that n * hi is exact.
  return {rounded, (x - n * 0.693359375f) + n * 2.12194440e-4f};
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
  return times_power_of_2(p * at.r + 1.0f, at.rounded);
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
  return {times_power_of_2(even + odd * at.r, at.rounded),
          over_power_of_2(even - odd * at.r, at.rounded)};
}

// e^x to 7e-6, 3e-6 of it the polynomial's, for what is then rounded to bf16: 2^t = 2^n p(t - n), p
// of degree 4 (minimax with p(0) = 1, so that e^0 is 1 and the maximum of a feature map is told by
// equality), 7 multiplications where exp has 10.
static inline Vec exp_for_bf16_within(Vec x) {
  const Vec rounded = x * LOG2_E + ROUND_MAGIC, r = x * LOG2_E - (rounded - ROUND_MAGIC);
  Vec p = splat(9.5828557e-3f);
  p = p * r + 5.590643e-2f;
  p = p * r + 0.24024099f;
  p = p * r + 0.69312418f;
  p = p * r + 1.0f;
  return times_power_of_2(p, rounded);
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
