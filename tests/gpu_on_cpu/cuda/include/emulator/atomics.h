// Atomics, which are relaxed, and fences, which order what surrounds them.
//
// To the thread sanitizer an atomic publishes what came before the last fence before it, and a
// fence acquires what the atomics before it have seen. A fence serves one atomic.
#pragma once

#include "runtime.h"

inline void __threadfence() { emulator::fence(); }

namespace emulator {
// Replaces *address by f of it; returns what was there.
template <class T, class F>
inline T update(T* address, F f) {
  before_atomic(address);
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = f(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  after_atomic(address);
  return before;
}
}  // namespace emulator

#define EMULATOR_ATOMIC(name, result)                                     \
  template <class T>                                                      \
  inline T name(T* address, typename emulator::Same<T>::type value) {     \
    return emulator::update(address, [=](T old) -> T { return result; }); \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicAnd, old& value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMULATOR_ATOMIC

template <class T>
inline T atomicCAS(T* address, typename emulator::Same<T>::type compare,
                   typename emulator::Same<T>::type value) {
  return emulator::update(address, [=](T old) { return old == compare ? value : old; });
}
