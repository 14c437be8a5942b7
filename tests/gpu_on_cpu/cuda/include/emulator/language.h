// Qualifiers, vector types, built-in variables, barriers of the block, cached loads and stores.
#pragma once

#include "runtime.h"

// Internal linkage: of functions that other files may share, g++ does not guard the static arrays.
#define __global__ static
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

// A block has a thread of the operating system to itself, hence its own thread-local variables.
// Only others get red zones from the address sanitizer; there, shared memory outlives the block.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#define EMULATOR_VECTORS(T, name, alignment2, alignment4)               \
  struct name##1 { T x; };                                              \
  struct alignas(alignment2) name##2 { T x, y; };                       \
  struct name##3 { T x, y, z; };                                        \
  struct alignas(alignment4) name##4 { T x, y, z, w; };                 \
  constexpr name##1 make_##name##1(T x) { return {x}; }                 \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(double, double, 16, 16)
#undef EMULATOR_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(emulator::Site site = {}) { emulator::block_barrier(site); }

// Hints to the caches. What differs from a plain access is that a misaligned one is always noticed.
namespace emulator {
template <class T>
inline void check_alignment(const T* pointer, Site site) {
  if (reinterpret_cast<size_t>(pointer) % alignof(T) != 0)
    fault(site, "misaligned access of %zu bytes", sizeof(T));
}
}  // namespace emulator

#define EMULATOR_LOAD(name)                                   \
  template <class T>                                          \
  inline T name(const T* pointer, emulator::Site site = {}) { \
    emulator::check_alignment(pointer, site);                 \
    return *pointer;                                          \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD

#define EMULATOR_STORE(name)                                        \
  template <class T>                                                \
  inline void name(T* pointer, T value, emulator::Site site = {}) { \
    emulator::check_alignment(pointer, site);                       \
    *pointer = value;                                               \
  }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE
