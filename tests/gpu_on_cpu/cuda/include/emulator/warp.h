// Lanes of a warp: barrier, shuffles, votes. The lanes of a mask meet; others pass.
#pragma once

#include "math.h"
#include "runtime.h"

inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = {}) {
  emulator::warp_barrier(mask, site);
}

namespace emulator {
template <class T>
inline T shuffle_value(unsigned mask, T value, int source, const char* name, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) {
    return bits_as<T>(shuffle(mask, bits_as<unsigned>(value), source, name, site));
  } else {
    const auto bits = bits_as<unsigned long long>(value);
    const unsigned low = shuffle(mask, static_cast<unsigned>(bits), source, name, site);
    const unsigned high = shuffle(mask, static_cast<unsigned>(bits >> 32), source, name, site);
    return bits_as<T>(static_cast<unsigned long long>(high) << 32 | low);
  }
}

// Lanes are shuffled within segments of `width`; a lane whose source is outside keeps its value.
constexpr int segment(int lane, int width) { return lane & -width; }
}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = {}) {
  const int lane = emulator::segment(emulator::lane(), width) | (source & (width - 1));
  return emulator::shuffle_value(mask, value, lane, "__shfl_sync", site);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                         emulator::Site site = {}) {
  const int lane = emulator::lane(), source = lane ^ bits;
  const bool below = emulator::segment(source, width) <= emulator::segment(lane, width);
  return emulator::shuffle_value(mask, value, below ? source : lane, "__shfl_xor_sync", site);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          emulator::Site site = {}) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  const bool inside = emulator::segment(source, width) == emulator::segment(lane, width);
  return emulator::shuffle_value(mask, value, inside ? source : lane, "__shfl_down_sync", site);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        emulator::Site site = {}) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  const bool inside = source >= emulator::segment(lane, width);
  return emulator::shuffle_value(mask, value, inside ? source : lane, "__shfl_up_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = {}) {
  return emulator::ballot(mask, predicate, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = {}) {
  return emulator::ballot(mask, predicate, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = {}) {
  return emulator::ballot(mask, !predicate, "__all_sync", site) == 0;
}
