// cvt, and the packing of small registers into large ones.
#include <limits>

#include "elementwise.h"

namespace ptx {
namespace {

// Registers of cvt may be wider than its types. S, D: types to convert from and to.
template <class D, class S, class F>
void add_conversion(std::string name, F) {
  add_operation(std::move(name), [](Warp& w, const Instruction& i, u32 lanes) {
    for_lanes(lanes, [&](int l) {
      u64 bits = w.get(i, 1, l);
      S source;
      std::memcpy(&source, &bits, sizeof source);
      D result = F{}(source);
      if constexpr (std::is_integral_v<D>) {
        bits = u64(result);  // extended by its sign, if it has one
      } else {
        bits = 0;
        std::memcpy(&bits, &result, sizeof result);
      }
      w.set(i, 0, l, bits);
    });
  });
}

template <class T>
struct Named {
  const char* name;
};

// Calls f(Named<T>...) for all integer types.
template <class F>
void for_integers(F f) {
  f(Named<u8>{"u8"}), f(Named<s8>{"s8"}), f(Named<u16>{"u16"}), f(Named<s16>{"s16"});
  f(Named<u32>{"u32"}), f(Named<s32>{"s32"}), f(Named<u64>{"u64"}), f(Named<s64>{"s64"});
}

void add_between_integers() {
  for_integers([]<class D>(Named<D> d) {
    for_integers([&]<class S>(Named<S> s) {
      add_conversion<D, S>(std::string("cvt.") + d.name + "." + s.name, [](S a) { return D(a); });
    });
  });
}

template <class R, class V>
void add_integers_and(const std::string& type) {
  for_integers([&]<class T>(Named<T> integer) {
    const std::string name = integer.name;
    add_conversion<R, T>("cvt." + type + "." + name, [](T a) { return R(V(a)); });
    const std::string suffix = name + "." + type;
    add_conversion<T, R>("cvt.rni." + suffix, [](R a) { return saturate<T>(std::rint(V(a))); });
    add_conversion<T, R>("cvt.rzi." + suffix, [](R a) { return saturate<T>(std::trunc(V(a))); });
    add_conversion<T, R>("cvt.rmi." + suffix, [](R a) { return saturate<T>(std::floor(V(a))); });
    add_conversion<T, R>("cvt.rpi." + suffix, [](R a) { return saturate<T>(std::ceil(V(a))); });
  });
}

// Towards zero: the rounded value, one step back where that went outwards.
template <class T>
T toward_zero(float a) {
  T rounded(a);
  if (std::fabs(float(rounded)) > std::fabs(a)) rounded.bits--;
  return rounded;
}

template <class T>
void add_half(const std::string& type) {
  add_elementwise<float, T>("cvt.f32." + type, [](T a) { return float(a); });
  add_elementwise<double, T>("cvt.f64." + type, [](T a) { return double(float(a)); });
  add_elementwise<T, float>("cvt." + type + ".f32", [](float a) { return T(a); });
  add_elementwise<T, float>("cvt.rz." + type + ".f32", [](float a) { return toward_zero<T>(a); });
  // The first source goes into the upper half.
  add_elementwise<Pair<T>, float, float>("cvt." + type + "x2.f32",
                                         [](float a, float b) { return Pair<T>{T(b), T(a)}; });
  add_elementwise<Pair<T>, float, float>("cvt.rz." + type + "x2.f32", [](float a, float b) {
    return Pair<T>{toward_zero<T>(b), toward_zero<T>(a)};
  });
}

void add_between_floats() {
  add_half<f16>("f16");
  add_half<bf16>("bf16");
  add_elementwise<double, float>("cvt.f64.f32", [](float a) { return double(a); });
  add_elementwise<float, double>("cvt.f32.f64", [](double a) { return float(a); });
  add_elementwise<u32, u32>("cvt.rna.tf32.f32", [](u32 a) { return tf32_from_float(a); });
  add_unary<float>("cvt.rni.f32.f32", [](float a) { return std::rint(a); });
  add_unary<float>("cvt.rzi.f32.f32", [](float a) { return std::trunc(a); });
  add_unary<float>("cvt.rmi.f32.f32", [](float a) { return std::floor(a); });
  add_unary<float>("cvt.rpi.f32.f32", [](float a) { return std::ceil(a); });
  add_unary<float>("cvt.f32.f32", [](float a) { return a; });
  add_unary<float>("cvt.sat.f32.f32",
                   [](float a) { return a != a ? 0.f : std::min(std::max(a, 0.f), 1.f); });
}

void pack(Warp& w, const Instruction& i, u32 lanes) {
  for_lanes(lanes, [&](int l) {
    u64 bits = 0;
    for (int k = 1, shift = 0; k < i.operands; shift += 8 * w.operand(i, k).bytes, k++)
      bits |= w.get(i, k, l) << shift;
    w.set(i, 0, l, bits);
  });
}

void unpack(Warp& w, const Instruction& i, u32 lanes) {
  for_lanes(lanes, [&](int l) {
    u64 bits = w.get(i, i.destinations, l);
    for (int k = 0; k < i.destinations; k++) {
      w.set(i, k, l, bits);
      bits = bits >> (8 * w.operand(i, k).bytes - 1) >> 1;
    }
  });
}

}  // namespace

void add_conversions() {
  add_between_integers();
  add_between_floats();
  add_integers_and<float, float>("f32");
  add_integers_and<double, double>("f64");
  add_integers_and<f16, float>("f16");
  add_integers_and<bf16, float>("bf16");
  add_operation("pack", pack);
  add_operation("unpack", unpack);
}

}  // namespace ptx
