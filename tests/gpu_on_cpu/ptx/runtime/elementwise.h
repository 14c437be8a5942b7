// Builds handlers from functions of one lane.
#pragma once

#include <tuple>
#include <utility>

#include "machine.h"

namespace ptx {

// d = f(sources...). F has no state, so that a handler can make one.
template <class D, class F, class... S, size_t... K>
inline void apply(Warp& w, const Instruction& i, u32 lanes, std::index_sequence<K...>) {
  D* d = w.values<D>(i, 0);
  auto sources = std::make_tuple(static_cast<const S*>(w.values<S>(i, int(K) + 1))...);
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; l++) d[l] = D(F{}(std::get<K>(sources)[l]...));
  } else {
    for_lanes(lanes, [&](int l) { d[l] = D(F{}(std::get<K>(sources)[l]...)); });
  }
}

template <class D, class... S, class F>
inline void add_elementwise(std::string name, F) {
  add_operation(
      std::move(name),
      [](Warp& w, const Instruction& i, u32 lanes) {
        apply<D, F, S...>(w, i, lanes, std::index_sequence_for<S...>{});
      },
      Flow::next, 1 + int(sizeof...(S)));
}

template <class T, class F>
inline void add_unary(std::string name, F f) {
  add_elementwise<T, T>(std::move(name), f);
}
template <class T, class F>
inline void add_binary(std::string name, F f) {
  add_elementwise<T, T, T>(std::move(name), f);
}
template <class T, class F>
inline void add_ternary(std::string name, F f) {
  add_elementwise<T, T, T, T>(std::move(name), f);
}

}  // namespace ptx
