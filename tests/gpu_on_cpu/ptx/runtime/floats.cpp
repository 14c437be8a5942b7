// Floating-point arithmetic. What the GPU approximates (div.full, ex2.approx, ...) is computed to
// the last bit here: tests compare with tolerances that hide the difference.
#include <cstring>

#include "elementwise.h"

namespace ptx {
namespace {

// Of the magnitudes, with the sign that the product has.
template <class F>
void add_xorsign(const std::string& name, F) {
  add_binary<float>(name + ".xorsign.abs.f32", [](float a, float b) {
    return std::copysign(F{}(std::fabs(a), std::fabs(b)),
                         std::signbit(a) != std::signbit(b) ? -1.f : 1.f);
  });
}

template <class T>
void add_minimum_and_maximum(const std::string& type) {
  add_binary<T>("min." + type, [](T a, T b) { return min_number(a, b); });
  add_binary<T>("max." + type, [](T a, T b) { return max_number(a, b); });
  add_binary<T>("min.NaN." + type, [](T a, T b) { return min_nan(a, b); });
  add_binary<T>("max.NaN." + type, [](T a, T b) { return max_nan(a, b); });
  add_unary<T>("neg." + type, [](T a) { return -a; });
  add_unary<T>("abs." + type, [](T a) { return std::fabs(a); });
}

// .ftz flushes subnormal operands and results to zero; without it they are kept.
struct Keep {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};
struct Flush {
  float operator()(float a) const { return flush(a); }
};

template <class T, class Z>
void add_arithmetic(const std::string& type) {
  add_binary<T>("add." + type, [](T a, T b) { return Z{}(Z{}(a) + Z{}(b)); });
  add_binary<T>("sub." + type, [](T a, T b) { return Z{}(Z{}(a)-Z{}(b)); });
  add_binary<T>("mul." + type, [](T a, T b) { return Z{}(Z{}(a)*Z{}(b)); });
  add_binary<T>("div." + type, [](T a, T b) { return Z{}(Z{}(a) / Z{}(b)); });
  add_ternary<T>("fma." + type,
                 [](T a, T b, T c) { return Z{}(std::fma(Z{}(a), Z{}(b), Z{}(c))); });
  add_unary<T>("rcp." + type, [](T a) { return Z{}(T(1) / Z{}(a)); });
  add_unary<T>("sqrt." + type, [](T a) { return std::sqrt(Z{}(a)); });
  add_unary<T>("rsqrt." + type, [](T a) { return T(1) / std::sqrt(Z{}(a)); });
}

template <class Z>
void add_functions(const std::string& type) {
  add_unary<float>("ex2." + type, [](float a) { return Z{}(std::exp2(Z{}(a))); });
  add_unary<float>("lg2." + type, [](float a) { return std::log2(Z{}(a)); });
  add_unary<float>("sin." + type, [](float a) { return Z{}(std::sin(Z{}(a))); });
  add_unary<float>("cos." + type, [](float a) { return Z{}(std::cos(Z{}(a))); });
}

// ------------------------------------------------------------------ 16 bits, alone and in pairs

template <class T, class F>
void add_half_binary(const std::string& name, const std::string& type, F) {
  add_binary<T>(name + type, [](T a, T b) { return T(F{}(float(a), float(b))); });
  add_binary<Pair<T>>(name + type + "x2", [](Pair<T> a, Pair<T> b) {
    return Pair<T>{F{}(float(a.low), float(b.low)), F{}(float(a.high), float(b.high))};
  });
}

template <class T, class F>
void add_half_unary(const std::string& name, const std::string& type, F) {
  add_unary<T>(name + type, [](T a) { return T(F{}(float(a))); });
  add_unary<Pair<T>>(name + type + "x2",
                     [](Pair<T> a) { return Pair<T>{F{}(float(a.low)), F{}(float(a.high))}; });
}

// nearest + error rounded to odd: what rounds that once more, to less, is not misled.
template <class Float, class Bits>
Float to_odd(Float nearest, double error) {
  Bits bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  if (!std::isfinite(error) || error == 0 || nearest == 0 || bits % 2) return nearest;
  bits += (error > 0) == (nearest > 0) ? 1 : -1;
  std::memcpy(&nearest, &bits, sizeof bits);
  return nearest;
}

// Rounded once. Products of two are exact in double, their sum with a third is not.
template <class T>
T fused(T a, T b, T c) {
  const double product = double(a) * double(b), sum = product + double(c), behind = sum - product;
  const double error = (product - (sum - behind)) + (double(c) - behind);
  const double wide = to_odd<double, s64>(sum, error);
  return T(to_odd<float, s32>(float(wide), wide - double(float(wide))));
}

template <class T>
void add_half(const std::string& type) {
  add_half_binary<T>("add.", type, [](float a, float b) { return a + b; });
  add_half_binary<T>("sub.", type, [](float a, float b) { return a - b; });
  add_half_binary<T>("mul.", type, [](float a, float b) { return a * b; });
  add_half_binary<T>("min.", type, [](float a, float b) { return min_number(a, b); });
  add_half_binary<T>("max.", type, [](float a, float b) { return max_number(a, b); });
  add_half_binary<T>("min.NaN.", type, [](float a, float b) { return min_nan(a, b); });
  add_half_binary<T>("max.NaN.", type, [](float a, float b) { return max_nan(a, b); });
  add_half_unary<T>("neg.", type, [](float a) { return -a; });
  add_half_unary<T>("abs.", type, [](float a) { return std::fabs(a); });
  add_half_unary<T>("ex2.", type, [](float a) { return std::exp2(a); });
  add_half_unary<T>("tanh.", type, [](float a) { return std::tanh(a); });
  add_ternary<T>("fma." + type, [](T a, T b, T c) { return fused(a, b, c); });
  add_ternary<Pair<T>>("fma." + type + "x2", [](Pair<T> a, Pair<T> b, Pair<T> c) {
    return Pair<T>{fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
  });
}

}  // namespace

void add_floats() {
  add_minimum_and_maximum<float>("f32");
  add_minimum_and_maximum<double>("f64");
  add_xorsign("min", [](float a, float b) { return min_number(a, b); });
  add_xorsign("max", [](float a, float b) { return max_number(a, b); });
  add_arithmetic<float, Keep>("f32");
  add_arithmetic<float, Flush>("ftz.f32");
  add_arithmetic<double, Keep>("f64");
  add_functions<Keep>("f32");
  add_functions<Flush>("ftz.f32");
  add_unary<float>("tanh.f32", [](float a) { return std::tanh(a); });
  add_half<f16>("f16");
  add_half<bf16>("bf16");
}

}  // namespace ptx
