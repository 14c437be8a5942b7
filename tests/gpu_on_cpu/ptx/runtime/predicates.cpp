// Comparisons, selections and logic of predicates, which hold one bit per lane.
#include "machine.h"

namespace ptx {
namespace {

void assign(u32& predicate, u32 lanes, u32 bits) {
  predicate = (predicate & ~lanes) | (bits & lanes);
}

// Combines what was compared with a third operand: immediate[0] is 0 for and, 1 for or, 2 for xor.
u32 combine(const Instruction& i, u32 compared, u32 other) {
  if (i.immediate[1]) other = ~other;
  switch (i.immediate[0]) {
    case 0:
      return compared & other;
    case 1:
      return compared | other;
    default:
      return compared ^ other;
  }
}

// setp: destinations p and q = not p (before combining), sources a, b, c.
template <class T, class F>
void add_comparison(std::string name, F) {
  add_operation(std::move(name), [](Warp& w, const Instruction& i, u32 lanes) {
    const T *a = w.values<T>(i, 2), *b = w.values<T>(i, 3);
    u32 compared = 0, other = w.predicate(i, 4);
    for (int l = 0; l < kLanes; l++) compared |= u32(F{}(a[l], b[l])) << l;
    assign(w.predicate(i, 1), lanes, combine(i, ~compared, other));
    assign(w.predicate(i, 0), lanes, combine(i, compared, other));
  });
}

template <class T>
void add_order(const std::string& type) {
  add_comparison<T>("setp.lt." + type, [](T a, T b) { return a < b; });
  add_comparison<T>("setp.le." + type, [](T a, T b) { return a <= b; });
  add_comparison<T>("setp.gt." + type, [](T a, T b) { return a > b; });
  add_comparison<T>("setp.ge." + type, [](T a, T b) { return a >= b; });
}

template <class T>
void add_equality(const std::string& type) {
  add_comparison<T>("setp.eq." + type, [](T a, T b) { return a == b; });
  add_comparison<T>("setp.ne." + type, [](T a, T b) { return a != b; });
}

// Ordered comparisons are false of NaN, unordered ones (equ, ...) true. V: the type to compare in.
template <class T, class V>
void add_float_comparisons(const std::string& type) {
  add_order<T>(type);
  add_comparison<T>("setp.eq." + type, [](T a, T b) { return V(a) == V(b); });
  add_comparison<T>("setp.ne." + type, [](T a, T b) { return V(a) < V(b) || V(a) > V(b); });
  add_comparison<T>("setp.equ." + type, [](T a, T b) { return !(V(a) < V(b) || V(a) > V(b)); });
  add_comparison<T>("setp.neu." + type, [](T a, T b) { return V(a) != V(b); });
  add_comparison<T>("setp.ltu." + type, [](T a, T b) { return !(V(a) >= V(b)); });
  add_comparison<T>("setp.leu." + type, [](T a, T b) { return !(V(a) > V(b)); });
  add_comparison<T>("setp.gtu." + type, [](T a, T b) { return !(V(a) <= V(b)); });
  add_comparison<T>("setp.geu." + type, [](T a, T b) { return !(V(a) < V(b)); });
  add_comparison<T>("setp.num." + type, [](T a, T b) { return V(a) == V(a) && V(b) == V(b); });
  add_comparison<T>("setp.nan." + type, [](T a, T b) { return V(a) != V(a) || V(b) != V(b); });
}

// Of pairs, p is what holds of the lower and q what holds of the upper halves.
template <class T, class F>
void add_pair_comparison(std::string name, F) {
  add_operation(std::move(name), [](Warp& w, const Instruction& i, u32 lanes) {
    const Pair<T>*a = w.values<Pair<T>>(i, 2), *b = w.values<Pair<T>>(i, 3);
    u32 low = 0, high = 0, other = w.predicate(i, 4);
    for (int l = 0; l < kLanes; l++) {
      low |= u32(F{}(float(a[l].low), float(b[l].low))) << l;
      high |= u32(F{}(float(a[l].high), float(b[l].high))) << l;
    }
    assign(w.predicate(i, 1), lanes, combine(i, high, other));
    assign(w.predicate(i, 0), lanes, combine(i, low, other));
  });
}

template <class T>
void add_pair_comparisons(const std::string& type) {
  add_pair_comparison<T>("setp.lt." + type, [](float a, float b) { return a < b; });
  add_pair_comparison<T>("setp.le." + type, [](float a, float b) { return a <= b; });
  add_pair_comparison<T>("setp.gt." + type, [](float a, float b) { return a > b; });
  add_pair_comparison<T>("setp.ge." + type, [](float a, float b) { return a >= b; });
  add_pair_comparison<T>("setp.eq." + type, [](float a, float b) { return a == b; });
  add_pair_comparison<T>("setp.neu." + type, [](float a, float b) { return a != b; });
}

template <class T>
void add_selection(std::string name) {
  add_operation(std::move(name), [](Warp& w, const Instruction& i, u32 lanes) {
    T *d = w.values<T>(i, 0), *a = w.values<T>(i, 1), *b = w.values<T>(i, 2);
    u32 chosen = w.predicate(i, 3);
    for (int l = 0; l < kLanes; l++) {
      T value = chosen >> l & 1 ? a[l] : b[l];
      d[l] = lanes >> l & 1 ? value : d[l];
    }
  });
}

template <class F>
void add_logic(std::string name, F) {
  add_operation(std::move(name), [](Warp& w, const Instruction& i, u32 lanes) {
    assign(w.predicate(i, 0), lanes, F{}(w.predicate(i, 1), w.predicate(i, i.operands - 1)));
  });
}

}  // namespace

void add_predicates() {
  add_equality<u16>("u16");
  add_equality<u32>("u32");
  add_equality<u64>("u64");
  add_order<u16>("u16");
  add_order<s16>("s16");
  add_order<u32>("u32");
  add_order<s32>("s32");
  add_order<u64>("u64");
  add_order<s64>("s64");
  add_float_comparisons<float, float>("f32");
  add_float_comparisons<double, double>("f64");
  add_float_comparisons<f16, float>("f16");
  add_float_comparisons<bf16, float>("bf16");
  add_pair_comparisons<f16>("f16x2");
  add_pair_comparisons<bf16>("bf16x2");
  add_selection<u16>("selp.u16");
  add_selection<u32>("selp.u32");
  add_selection<u64>("selp.u64");
  add_logic("and.pred", [](u32 a, u32 b) { return a & b; });
  add_logic("or.pred", [](u32 a, u32 b) { return a | b; });
  add_logic("xor.pred", [](u32 a, u32 b) { return a ^ b; });
  add_logic("not.pred", [](u32 a, u32) { return ~a; });
  add_logic("mov.pred", [](u32 a, u32) { return a; });
}

}  // namespace ptx
