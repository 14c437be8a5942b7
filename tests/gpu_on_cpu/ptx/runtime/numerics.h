// Number formats of the GPU, and operations on bits that C++ lacks.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace ptx {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

// ------------------------------------------------------------------ 16-bit floats

inline u16 bf16_from_float(float x) {  // to nearest even; NaN is the one that GPUs produce
  if (x != x) return 0x7fff;
  u32 bits = std::bit_cast<u32>(x);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_to_float(u16 bits) { return std::bit_cast<float>(u32(bits) << 16); }
inline u16 f16_from_float(float x) { return std::bit_cast<u16>(_Float16(x)); }
inline float f16_to_float(u16 bits) { return float(std::bit_cast<_Float16>(bits)); }

// Arithmetic on these is done in float, which has more than twice their bits: rounding + - * twice
// is then the same as rounding once.
struct bf16 {
  u16 bits;
  bf16() = default;
  bf16(float x) : bits(bf16_from_float(x)) {}
  operator float() const { return bf16_to_float(bits); }
};
struct f16 {
  u16 bits;
  f16() = default;
  f16(float x) : bits(f16_from_float(x)) {}
  operator float() const { return f16_to_float(bits); }
};
template <class T>
struct Pair {
  T low, high;
};

// ------------------------------------------------------------------ 32-bit floats

// cvt.rna.tf32: to nearest, ties away from zero, of the 13 bits that the format lacks.
inline u32 tf32_from_float(u32 bits) {
  bool finite = (bits & 0x7f800000) != 0x7f800000;
  return finite ? (bits + 0x1000) & 0xffffe000 : bits;
}
// What a tensor core reads from a register: it ignores the low 13 bits.
inline float tf32_to_float(u32 bits) { return std::bit_cast<float>(bits & 0xffffe000); }

struct tf32 {
  u32 bits;
  operator float() const { return tf32_to_float(bits); }
};

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

template <class T>
inline T min_number(T a, T b) {
  return std::isnan(a) ? b : std::isnan(b) ? a : std::min(a, b);
}
template <class T>
inline T max_number(T a, T b) {
  return std::isnan(a) ? b : std::isnan(b) ? a : std::max(a, b);
}
template <class T>
inline T min_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? T(NAN) : std::min(a, b);
}
template <class T>
inline T max_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? T(NAN) : std::max(a, b);
}

// ------------------------------------------------------------------ bits

template <class T>
constexpr u32 kBits = sizeof(T) * 8;

template <class T>
inline T shift_left(T a, u32 n) {
  return n >= kBits<T> ? 0 : T(a << n);
}
template <class T>
inline T shift_right(T a, u32 n) {
  return T(a >> std::min(n, kBits<T> - 1) >> (n >= kBits<T>));
}

template <class T>
inline T extract_bits(T a, u32 position, u32 length) {  // bfe
  position &= 255, length &= 255;
  if (!length) return 0;
  position = std::min(position, kBits<T> - (std::is_signed_v<T> ? 1 : 0));
  length = std::min(length, kBits<T> - position);
  if (!length) return 0;
  T top = T(std::make_unsigned_t<T>(a) << (kBits<T> - position - length));
  return T(top >> (kBits<T> - length));
}

template <class T>
inline T insert_bits(T a, T b, u32 position, u32 length) {  // bfi
  position &= 255, length &= 255;
  if (position >= kBits<T> || !length) return b;
  T ones = length >= kBits<T> ? ~T(0) : T((T(1) << length) - 1);
  T mask = T(ones << position);
  return T((b & ~mask) | (T(a << position) & mask));
}

inline u32 lookup3(u32 a, u32 b, u32 c, u32 table) {  // lop3
  u32 result = 0;
  for (u32 row = 0; row < 8; row++)
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}

inline u32 permute_bytes(u32 a, u32 b, u32 selector) {  // prmt
  u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 choice = selector >> (4 * i) & 15;
    u8 byte = u8(bytes >> ((choice & 7) * 8));
    if (choice & 8) byte = u8(s8(byte) >> 7);
    result |= u32(byte) << (8 * i);
  }
  return result;
}

template <class T>
inline T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(Wide(a) * Wide(b) >> kBits<T>);
}

inline u32 reverse_bits(u32 a) {
  u32 result = 0;
  for (int i = 0; i < 32; i++) result |= (a >> i & 1) << (31 - i);
  return result;
}

}  // namespace ptx
