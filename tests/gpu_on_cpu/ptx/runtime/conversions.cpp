// cvt, and the packing of small registers into large ones.
#include "elementwise.h"

namespace ptx {
namespace {

// ------------------------------------------------------------------ integers
// Registers may be wider than the types, which are given by immediates: bytes of the integer that
// is read, whether it is signed, then the same of the one that is written.

s64 read_integer(Warp& w, const Instruction& i, int lane) {
  const int unused = 64 - 8 * i.immediate[0];
  u64 bits = w.get(i, 1, lane) << unused;
  return i.immediate[1] ? s64(bits) >> unused : s64(bits >> unused);
}

// Extends by the sign, if there is one, to the width of the register.
void write_integer(Warp& w, const Instruction& i, int lane, u64 bits) {
  const int unused = 64 - 8 * i.immediate[2];
  bits <<= unused;
  w.set(i, 0, lane, i.immediate[3] ? u64(s64(bits) >> unused) : bits >> unused);
}

void convert_integer(Warp& w, const Instruction& i, u32 lanes) {
  for_lanes(lanes, [&](int l) { write_integer(w, i, l, u64(read_integer(w, i, l))); });
}

// NaN becomes 0, what is out of range the nearest integer. x is integral.
u64 saturate(double x, int bytes, bool is_signed) {
  if (x != x) return 0;
  const int bits = 8 * bytes - is_signed;
  const u64 most = ~u64(0) >> (64 - bits);
  const double end = std::ldexp(1., bits);
  if (x >= end) return most;
  if (x < 0) return !is_signed ? 0 : x <= -end ? ~most : u64(s64(x));
  return u64(x);
}

template <class R, class F>
void add_rounding(const std::string& name, F) {
  add_operation(name, [](Warp& w, const Instruction& i, u32 lanes) {
    for_lanes(lanes, [&](int l) {
      double rounded = F{}(double(w.values<R>(i, 1)[l]));
      write_integer(w, i, l, saturate(rounded, i.immediate[2], i.immediate[3]));
    });
  });
}

// V: the type to round to first; 16-bit formats are rounded once more, to themselves.
template <class R, class V>
void add_integers_and(const std::string& type) {
  add_operation("cvt." + type + ".integer", [](Warp& w, const Instruction& i, u32 lanes) {
    for_lanes(lanes, [&](int l) {
      s64 value = read_integer(w, i, l);
      w.values<R>(i, 0)[l] = R(i.immediate[1] ? V(value) : V(u64(value)));
    });
  });
  add_rounding<R>("cvt.rni.integer." + type, [](double a) { return std::rint(a); });
  add_rounding<R>("cvt.rzi.integer." + type, [](double a) { return std::trunc(a); });
  add_rounding<R>("cvt.rmi.integer." + type, [](double a) { return std::floor(a); });
  add_rounding<R>("cvt.rpi.integer." + type, [](double a) { return std::ceil(a); });
}

// ------------------------------------------------------------------ floats

// Towards zero: the rounded value, one step back where that went outwards.
template <class T>
T toward_zero(float a) {
  T rounded(a);
  if (std::fabs(float(rounded)) > std::fabs(a)) rounded.bits--;
  return rounded;
}

template <class T>
void add_half_conversions(const std::string& type) {
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
  add_half_conversions<f16>("f16");
  add_half_conversions<bf16>("bf16");
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
  add_operation("cvt.integer", convert_integer);
  add_between_floats();
  add_integers_and<float, float>("f32");
  add_integers_and<double, double>("f64");
  add_integers_and<f16, float>("f16");
  add_integers_and<bf16, float>("bf16");
  add_operation("pack", pack);
  add_operation("unpack", unpack);
}

}  // namespace ptx
