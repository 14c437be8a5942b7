// The matrix unit (AMX): C[16 x 16] += A[16 x 16 words] B[16 words x 16] in 16 cycles, the words
// being pairs of bf16 as in gemm.h and C fp32. That is 16 times what two FMA units of 512 bits do.
// Tests emulate it where it is missing.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__) || defined(LOL_EMULATE_MATRIX_UNIT)
#define LOL_MATRIX_UNIT 1
#endif

namespace lol {
namespace LOL_ISA {

constexpr int TILE = 16;  // rows of a tile, and the words of a row

#ifdef __AMX_BF16__

// While one is alive, its thread's eight tiles are TILE rows of TILE words. Afterwards they are
// free, which keeps them out of what the system saves when it switches threads.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; t++) config.row_bytes[t] = 4 * TILE, config.rows[t] = TILE;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Tiles are named by number; strides count words.
template <int T>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
static inline void tile_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(4 * stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(4 * stride), "i"(T) : "memory");
}
template <int C, int A, int B>
static inline void tile_add_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

class MatrixUnit {};

#endif
#ifdef LOL_EMULATE_MATRIX_UNIT

static thread_local float emulated_tiles[8][TILE * TILE];
template <int T>
static inline void tile_zero() {
  memset(emulated_tiles[T], 0, sizeof(emulated_tiles[T]));
}
template <int T>
static inline void tile_load(const float* p, int64_t stride) {
  for (int i = 0; i < TILE; i++) store(emulated_tiles[T] + i * TILE, load(p + i * stride));
}
template <int T>
static inline void tile_store(float* p, int64_t stride) {
  for (int i = 0; i < TILE; i++) store(p + i * stride, load(emulated_tiles[T] + i * TILE));
}
template <int C, int A, int B>
static inline void tile_add_dot() {
  for (int i = 0; i < TILE; i++) {
    float* c = emulated_tiles[C] + i * TILE;
    Vec sum = load(c);
    for (int k = 0; k < TILE; k++)
      sum =
          add_dot(sum, splat(emulated_tiles[A][i * TILE + k]), load(emulated_tiles[B] + k * TILE));
    store(c, sum);
  }
}

#endif

}  // namespace LOL_ISA
}  // namespace lol
