// Integer arithmetic and bits. Operations whose result does not depend on signedness exist for
// unsigned types only.
#include "elementwise.h"

namespace ptx {
namespace {

template <class T>
void add_wrapping(const std::string& type) {
  add_binary<T>("add." + type, [](T a, T b) { return T(a + b); });
  add_binary<T>("sub." + type, [](T a, T b) { return T(a - b); });
  add_binary<T>("mul.lo." + type, [](T a, T b) { return T(u64(a) * b); });
  add_ternary<T>("mad.lo." + type, [](T a, T b, T c) { return T(u64(a) * b + c); });
  add_unary<T>("neg." + type, [](T a) { return T(-a); });
  add_binary<T>("and." + type, [](T a, T b) { return T(a & b); });
  add_binary<T>("or." + type, [](T a, T b) { return T(a | b); });
  add_binary<T>("xor." + type, [](T a, T b) { return T(a ^ b); });
  add_unary<T>("not." + type, [](T a) { return T(~a); });
  add_unary<T>("cnot." + type, [](T a) { return T(!a); });
  add_unary<T>("mov." + type, [](T a) { return a; });
  add_elementwise<T, T, u32>("shl." + type, [](T a, u32 n) { return shift_left(a, n); });
}

template <class T>
void add_signed_or_unsigned(const std::string& type) {
  add_binary<T>("min." + type, [](T a, T b) { return std::min(a, b); });
  add_binary<T>("max." + type, [](T a, T b) { return std::max(a, b); });
  // Division by zero gives all ones; so does, here, the overflowing quotient of the smallest
  // number.
  add_binary<T>("div." + type,
                [](T a, T b) { return !b || b == T(-1) ? T(b ? 0u - u64(a) : -1) : T(a / b); });
  add_binary<T>("rem." + type, [](T a, T b) {
    return !b ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b);
  });
  add_binary<T>("mul.hi." + type, [](T a, T b) { return high_product(a, b); });
  add_ternary<T>("mad.hi." + type,
                 [](T a, T b, T c) { return T(u64(high_product(a, b)) + u64(c)); });
  add_elementwise<T, T, u32>("shr." + type, [](T a, u32 n) { return shift_right(a, n); });
  add_elementwise<T, T, u32, u32>("bfe." + type,
                                  [](T a, u32 p, u32 n) { return extract_bits(a, p, n); });
}

template <class T, class Wide>
void add_wide(const std::string& type) {
  add_elementwise<Wide, T, T>("mul.wide." + type, [](T a, T b) { return Wide(a) * Wide(b); });
  add_elementwise<Wide, T, T, Wide>(
      "mad.wide." + type, [](T a, T b, Wide c) { return Wide(u64(Wide(a) * Wide(b)) + u64(c)); });
}

template <class T>
void add_bits(const std::string& type) {
  add_elementwise<u32, T>("popc." + type, [](T a) { return u32(std::popcount(a)); });
  add_elementwise<u32, T>("clz." + type, [](T a) { return u32(std::countl_zero(a)); });
  add_elementwise<T, T, T, u32, u32>(
      "bfi." + type, [](T a, T b, u32 p, u32 n) { return insert_bits(a, b, p, n); });
}

}  // namespace

void add_integers() {
  add_wrapping<u16>("u16");
  add_wrapping<u32>("u32");
  add_wrapping<u64>("u64");
  add_signed_or_unsigned<u16>("u16");
  add_signed_or_unsigned<s16>("s16");
  add_signed_or_unsigned<u32>("u32");
  add_signed_or_unsigned<s32>("s32");
  add_binary<s32>("min.relu.s32", [](s32 a, s32 b) { return std::max(std::min(a, b), 0); });
  add_binary<s32>("max.relu.s32", [](s32 a, s32 b) { return std::max({a, b, 0}); });
  add_signed_or_unsigned<u64>("u64");
  add_signed_or_unsigned<s64>("s64");
  add_wide<u16, u32>("u16");
  add_wide<s16, s32>("s16");
  add_wide<u32, u64>("u32");
  add_wide<s32, s64>("s32");
  add_bits<u32>("u32");
  add_bits<u64>("u64");
  add_unary<s16>("abs.s16", [](s16 a) { return s16(a < 0 ? -a : a); });
  add_unary<s32>("abs.s32", [](s32 a) { return a < 0 ? s32(0u - u32(a)) : a; });
  add_unary<s64>("abs.s64", [](s64 a) { return a < 0 ? s64(0ull - u64(a)) : a; });
  add_unary<u32>("brev.u32", [](u32 a) { return reverse_bits(a); });
  add_elementwise<u32, u32, u32, u32, u32>(
      "lop3.u32", [](u32 a, u32 b, u32 c, u32 t) { return lookup3(a, b, c, t); });
  add_elementwise<u32, u32, u32, u32>("prmt.u32",
                                      [](u32 a, u32 b, u32 s) { return permute_bytes(a, b, s); });
  add_elementwise<u32, u32, u32, u32>("shf.l.wrap", [](u32 low, u32 high, u32 n) {
    return u32((u64(high) << 32 | low) << (n & 31) >> 32);
  });
  add_elementwise<u32, u32, u32, u32>("shf.r.wrap", [](u32 low, u32 high, u32 n) {
    return u32((u64(high) << 32 | low) >> (n & 31));
  });
  add_elementwise<u32, u32, u32, u32>("shf.l.clamp", [](u32 low, u32 high, u32 n) {
    return u32((u64(high) << 32 | low) << std::min(n, 32u) >> 32);
  });
  add_elementwise<u32, u32, u32, u32>("shf.r.clamp", [](u32 low, u32 high, u32 n) {
    return u32((u64(high) << 32 | low) >> std::min(n, 32u));
  });
}

}  // namespace ptx
