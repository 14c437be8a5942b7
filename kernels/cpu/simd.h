// Vectors of floats, written once for every instruction set in GCC/Clang vector extensions: this
// file is compiled with the flags of each one, and the compiler picks the instructions. Builtins
// stand only where it does not: min, max, numbers of 16 bits, stores past the caches, inserts and
// tests of masks, AVX-512's reciprocal and its bf16. Other CPUs, aarch64 among them, get the set
// named scalar: vectors of four floats.
//
// ISA files include C headers only and live in namespace lol::LOL_ISA: an inline function of the
// C++ library compiled with AVX-512 could otherwise win at link time and crash an older CPU.
#pragma once
#ifdef __AVX__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef LOL_LANES
#if defined(__AVX512F__)
#define LOL_LANES 16
#elif defined(__AVX__)
#define LOL_LANES 8
#else
#define LOL_LANES 4
#endif
#endif

namespace lol {
namespace LOL_ISA {

constexpr int LANES = LOL_LANES;
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t VecI __attribute__((vector_size(4 * LANES)));
typedef uint32_t VecU __attribute__((vector_size(4 * LANES)));
typedef uint16_t VecH __attribute__((vector_size(2 * LANES)));
typedef float Vec4 __attribute__((vector_size(16)));

// Unrolled before the compiler decides what lives in registers: else the accumulators take a detour
// over the stack.
#define LOL_UNROLL _Pragma("GCC unroll 16")

template <class V, class T>
static inline V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
typedef float VecAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
static inline Vec load(const float* p) { return *(const VecAnywhere*)p; }
static inline void store(float* p, Vec v) { *(VecAnywhere*)p = v; }
// The first `count` lanes, where a row may end within a vector.
static inline Vec load_first(const float* from, int count) {
  if (count >= LANES) return load(from);
  Vec v = {};
  memcpy(&v, from, sizeof(float) * (size_t)count);
  return v;
}
static inline void store_first(float* to, Vec v, int count) {
  if (count >= LANES) return store(to, v);
  memcpy(to, &v, sizeof(float) * (size_t)count);
}
// Past the caches, which else would read each line first. p is aligned. Other threads see what a
// thread wrote after it has called end_of_stream().
static inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__) && LOL_LANES == 8
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
static inline void end_of_stream() {
#ifdef __AVX__
  _mm_sfence();
#endif
}
// x - 0 is x for every x, while 0 + x is not for -0: this way no addition remains.
static inline Vec splat(float x) { return x - Vec{}; }
// sum + a b, in the register that sum is in: where several of these follow one another, GCC moves
// sums to other registers, and some to memory. In the second, a is an operand of the instruction on
// AVX-512.
#if defined(__AVX512F__) && !defined(__clang__)
static inline Vec multiply_add(Vec sum, Vec a, Vec b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
static inline Vec multiply_add(Vec sum, const float* a, Vec b) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  return sum;
}
#else
static inline Vec multiply_add(Vec sum, Vec a, Vec b) {
#if defined(__FMA__) && LOL_LANES == 8 && !defined(__clang__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return sum + a * b;
#endif
}
static inline Vec multiply_add(Vec sum, const float* a, Vec b) {
  return multiply_add(sum, splat(*a), b);
}
#endif
static inline VecI splat_int(int32_t x) { return VecI{} + x; }
static inline VecI lane_index() {
  VecI v;
  for (int i = 0; i < LANES; i++) v[i] = i;
  return v;
}
// x as it has been rounded: else a product and a difference become one multiply-add. Where x is the
// maximum that is taken away, what is left has to be 0, not what rounding took, which exp of large
// numbers shows.
static inline Vec rounded(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE__) && LOL_LANES <= 8
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}
// NaN in the first argument stays. The ternary is what the instructions do, but GCC does not see it
// through a constant argument, and blending costs twice as much.
#if defined(__AVX512F__)
static inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)b, (__m512)a); }
static inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)b, (__m512)a); }
#elif LOL_LANES == 8 && defined(__AVX__)
static inline Vec max(Vec a, Vec b) { return __builtin_ia32_maxps256(b, a); }
static inline Vec min(Vec a, Vec b) { return __builtin_ia32_minps256(b, a); }
#else
static inline Vec max(Vec a, Vec b) { return a < b ? b : a; }
static inline Vec min(Vec a, Vec b) { return b < a ? b : a; }
#endif
static inline Vec select(VecI mask, Vec a, Vec b) { return mask ? a : b; }
// Whether x is no more than that in all lanes; a NaN is not.
static inline bool all_at_most(Vec x, float most) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(most), _CMP_LE_OQ) == 0xffff;
#else
  const VecI mask = x <= splat(most);
  for (int i = 0; i < LANES; i++) {
    if (!mask[i]) return false;
  }
  return true;
#endif
}
// The larger of a, which is not negative, and |b|.
static inline Vec max_magnitude(Vec a, Vec b) {
#ifdef __AVX512DQ__
  return (Vec)_mm512_range_ps((__m512)a, (__m512)b, 0b1011);  // the larger magnitude, without sign
#else
  return max(a, (Vec)((VecI)b & 0x7fffffff));
#endif
}
// 1 / x, to 14 bits where an instruction estimates that: enough for what is then rounded to bf16. x
// is normal and so is 1 / x.
static inline Vec reciprocal_for_bf16(Vec x) {
#ifdef __AVX512F__
  return (Vec)_mm512_rcp14_ps((__m512)x);
#else
  return 1.0f / x;
#endif
}
// The sum of the lanes, in quarters.
static inline Vec4 quarter_sums(Vec v) {
  Vec4 parts[LANES / 4];
  memcpy(parts, &v, sizeof(v));
  for (int width = LANES / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  }
  return parts[0];
}
static inline float horizontal_sum(Vec v) {
  const Vec4 q = quarter_sums(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

static inline float horizontal_max(Vec v) {
  float parts[LANES];
  memcpy(parts, &v, sizeof(v));
  for (int width = LANES / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++)
      parts[i] = parts[i] < parts[i + width] ? parts[i + width] : parts[i];
  }
  return parts[0];
}

// Numbers of 16 bits as words; GCC would split the vector.
static inline VecU load_halves(const uint16_t* p) {
  const VecH halves = load_as<VecH>(p);
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__) && LOL_LANES == 8
  return (VecU)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, VecU);
#endif
}

// bf16 is the upper half of a float; rounding is to nearest, ties to even, and a NaN stays one.
static inline Vec from_bf16(const uint16_t* p) { return (Vec)(load_halves(p) << 16); }
static inline float bf16_value(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline void to_bf16(uint16_t* p, Vec v) {
#ifdef __AVX512BF16__
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VecU quiet = (u >> 16) | 0x40;
  const VecH h = __builtin_convertvector((VecU)(v == v ? (VecI)rounded : (VecI)quiet), VecH);
#endif
  memcpy(p, &h, sizeof(h));
}

// Pairs of bf16: words of which the lower half comes first. Their products add up two at a time.
#if defined(__AVX512BF16__) || defined(LOL_EMULATE_PAIRS)
#define LOL_PAIRS 1
static inline Vec first_of(Vec pairs) { return (Vec)((VecU)pairs << 16); }
static inline Vec without_second(Vec pairs) { return (Vec)((VecU)pairs & 0xffffu); }
static inline Vec second_of(Vec pairs) { return (Vec)((VecU)pairs & 0xffff0000u); }
#endif
#ifdef __AVX512BF16__
// Both rounded, one behind the other,
typedef __m512i Halves;
static inline Halves halves(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
static inline void store_first_half(uint16_t* p, Halves both) {
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(both));
}
static inline void store_second_half(uint16_t* p, Halves both) {
  _mm256_storeu_si256((__m256i*)p, _mm512_extracti64x4_epi64(both, 1));
}
// or as pairs.
static inline Vec pairs_of(Halves both) {
  alignas(64) static const uint16_t INTERLEAVE[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(INTERLEAVE), both);
}
static inline Vec add_dot(Vec sum, Vec a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
// sum + a * b for one word a, an operand of the instruction. GCC does not see that it can be one,
// and broadcasts of its own compete with multiplications on AMD's Zen 4.
static inline Vec add_dot_of_word(Vec sum, const float* a, Vec b) {
#ifdef __clang__
  return add_dot(sum, splat(*a), b);
#else
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  return sum;
#endif
}
#elif defined(LOL_PAIRS)
struct Halves {
  uint16_t of[2][LANES];
};
static inline Halves halves(Vec first, Vec second) {
  Halves both;
  to_bf16(both.of[0], first);
  to_bf16(both.of[1], second);
  return both;
}
static inline void store_first_half(uint16_t* p, const Halves& both) {
  memcpy(p, both.of[0], 2 * LANES);
}
static inline void store_second_half(uint16_t* p, const Halves& both) {
  memcpy(p, both.of[1], 2 * LANES);
}
static inline Vec pairs_of(const Halves& both) {
  return (Vec)(load_halves(both.of[0]) | load_halves(both.of[1]) << 16);
}
static inline Vec add_dot(Vec sum, Vec a, Vec b) {
  return sum + second_of(a) * second_of(b) + first_of(a) * first_of(b);
}
static inline Vec add_dot_of_word(Vec sum, const float* a, Vec b) {
  return add_dot(sum, splat(*a), b);
}
#endif
#ifdef LOL_PAIRS
static inline Vec pair(Vec first, Vec second) { return pairs_of(halves(first, second)); }
#endif

// fp16, by the instructions for it or with integers. Shifting exponent and mantissa into place
// leaves the bias wrong by 112, which one multiplication mends, subnormals included. Infinity and
// NaN (exponent 31) get the float's exponent 255.
static inline Vec from_fp16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)load_as<VecH>(p));
#elif defined(__F16C__) && LOL_LANES == 8
  return (Vec)_mm256_cvtph_ps((__m128i)load_as<VecH>(p));
#else
  const VecU h = load_halves(p);
  const VecU magnitude = (h & 0x7fff) << 13;
  const Vec finite = (Vec)magnitude * 0x1p112f;
  const VecI special = (VecI)(magnitude | 0x7f800000);
  const VecI bits = (VecI)(magnitude >= 0x0f800000) ? special : (VecI)finite;
  return (Vec)(bits | (VecI)((h & 0x8000) << 16));
#endif
}
static inline void to_fp16(uint16_t* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i out = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && LOL_LANES == 8
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const VecU u = (VecU)v;
  const VecU sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Normal: rebias, round to nearest even on bit 13. Subnormal: adding 0.5 leaves the fp16 bits in
  // the float's mantissa.
  const VecU normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const VecU subnormal = (VecU)((Vec)magnitude + 0.5f) - 0x3f000000;
  VecU h = (VecU)(magnitude < 0x38800000) ? subnormal : normal;
  h = (VecU)(magnitude >= 0x477ff000) ? VecU{} + 0x7c00 : h;  // 65520 and above round to infinity
  h = (VecU)(magnitude > 0x7f800000) ? VecU{} + 0x7e00 : h;
  const VecH out = __builtin_convertvector(h | sign, VecH);
#endif
  memcpy(p, &out, sizeof(out));
}

// Quarters are the 128 bits within which shuffles are cheapest. LOL_IN_QUARTERS picks the same four
// floats of each quarter of a and b (4 to 7 name those of b).
#define LOL_PICK(i, q) ((i) < 4 ? 4 * (q) + (i) : LOL_LANES + 4 * (q) + (i) - 4)
#define LOL_PICK4(a, b, c, d, q) LOL_PICK(a, q), LOL_PICK(b, q), LOL_PICK(c, q), LOL_PICK(d, q)
#if LOL_LANES == 16
#define LOL_IN_QUARTERS(x, y, a, b, c, d)                                           \
  __builtin_shufflevector(x, y, LOL_PICK4(a, b, c, d, 0), LOL_PICK4(a, b, c, d, 1), \
                          LOL_PICK4(a, b, c, d, 2), LOL_PICK4(a, b, c, d, 3))
#elif LOL_LANES == 8
#define LOL_IN_QUARTERS(x, y, a, b, c, d) \
  __builtin_shufflevector(x, y, LOL_PICK4(a, b, c, d, 0), LOL_PICK4(a, b, c, d, 1))
#else
#define LOL_IN_QUARTERS(x, y, a, b, c, d) __builtin_shufflevector(x, y, LOL_PICK4(a, b, c, d, 0))
#endif

// Transposes the 4 x 4 floats that each quarter has in four vectors.
static inline void transpose4(const Vec* in, Vec* out) {
  const Vec ab0 = LOL_IN_QUARTERS(in[0], in[1], 0, 4, 1, 5),
            ab1 = LOL_IN_QUARTERS(in[0], in[1], 2, 6, 3, 7);
  const Vec cd0 = LOL_IN_QUARTERS(in[2], in[3], 0, 4, 1, 5),
            cd1 = LOL_IN_QUARTERS(in[2], in[3], 2, 6, 3, 7);
  out[0] = LOL_IN_QUARTERS(ab0, cd0, 0, 1, 4, 5);
  out[1] = LOL_IN_QUARTERS(ab0, cd0, 2, 3, 6, 7);
  out[2] = LOL_IN_QUARTERS(ab1, cd1, 0, 1, 4, 5);
  out[3] = LOL_IN_QUARTERS(ab1, cd1, 2, 3, 6, 7);
}
// The sums of the lanes of four vectors.
static inline Vec4 sums_of_4(const Vec* v) {
  Vec columns[4];
  transpose4(v, columns);
  return quarter_sums((columns[0] + columns[2]) + (columns[1] + columns[3]));
}

// The vector whose quarter q is at p + 4 * q * stride.
static inline Vec load_quarters(const float* p, int64_t stride) {
  // Inserting from memory is a load and a blend. GCC would shuffle instead, on the one port that
  // transposing is short of, or in 256 bits write the halves to the stack, and wait for them there.
#ifdef __AVX512F__
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * stride), 2);
  return (Vec)_mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * stride), 3);
#elif defined(__AVX2__) && LOL_LANES == 8
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                   _mm_loadu_ps(p + 4 * stride), 1);
#else
  Vec v;
  for (int q = 0; q < LANES / 4; q++) memcpy((char*)&v + 16 * q, p + 4 * q * stride, 16);
  return v;
#endif
}

// dst[cols x LANES] = the transpose of src[LANES x cols]; cols is padded to a multiple of 4. Every
// quarter of a vector takes four rows, so that stores are whole vectors.
static inline void transpose_rows(float* dst, int64_t ldd, const float* src, int64_t lds,
                                  int cols) {
  for (int j = 0; j < cols; j += 4, dst += 4 * ldd) {
    Vec in[4], out[4];
    for (int r = 0; r < 4; r++) in[r] = load_quarters(src + r * lds + j, lds);
    transpose4(in, out);
    for (int r = 0; r < 4; r++) store(dst + r * ldd, out[r]);
  }
}
// LANES rows of dst = the transpose of src[cols x LANES], likewise.
static inline void transpose_columns(float* dst, int64_t ldd, const float* src, int64_t lds,
                                     int cols) {
  for (int j = 0; j < cols; j += 4, src += 4 * lds) {
    Vec in[4], out[4];
    for (int r = 0; r < 4; r++) in[r] = load(src + r * lds);
    transpose4(in, out);
    for (int r = 0; r < 4; r++) {
      for (int q = 0; q < LANES / 4; q++)
        memcpy(dst + (4 * q + r) * ldd + j, (const char*)&out[r] + 16 * q, 16);
    }
  }
}

}  // namespace LOL_ISA
}  // namespace lol
