// The wrappers of inline PTX: names and meaning of those that the kernels have for the GPU.
#pragma once

#include "atomics.h"
#include "language.h"
#include "math.h"
#include "runtime.h"

namespace ptx {

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared());
}

inline int opaque(int x) { return x; }
inline int thread_of_block() { return static_cast<int>(threadIdx.x); }

// ---- Asynchronous copies: they land at the wait, as late as a GPU may let them. Until then their
// destination is NaN, and the address sanitizer reports whoever reads it.

namespace detail {
inline unsigned source_word(const emulator::Copy& copy, int first) {
  const auto* bytes = static_cast<const volatile unsigned char*>(copy.global) + first;
  const int count = copy.source_bytes - first;
  if (count >= 4) return *reinterpret_cast<const volatile unsigned*>(bytes);
  unsigned word = 0;
  for (int i = 0; i < count; i++) word |= static_cast<unsigned>(bytes[i]) << (8 * i);
  return word;
}
inline volatile unsigned& destination_word(const emulator::Copy& copy, int first) {
  return *reinterpret_cast<unsigned*>(static_cast<char*>(copy.shared) + first);
}
}  // namespace detail

template <int kBytes>
inline void cp_async(void* shared, const void* global, int source_bytes = kBytes,
                     emulator::Site site = {}) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const emulator::Copy copy{shared, global, kBytes, source_bytes, 0};
  emulator::check_copy(copy, site);
  // Sanitizers see both accesses at the issue, too: a copy may land at once.
  for (int i = 0; i < kBytes; i += 4) {
    (void)detail::source_word(copy, i);
    detail::destination_word(copy, i) = ~0u;
  }
  emulator::issue(copy);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int kGroups>
inline void cp_async_wait() {
  for (emulator::Copy copy; emulator::land_copy(kGroups, &copy);) {
    for (int i = 0; i < copy.bytes; i += 4)
      detail::destination_word(copy, i) = detail::source_word(copy, i);
  }
}

// ---- Tensor cores

namespace detail {
template <int kMatrices>
inline void load_matrices(unsigned (&r)[kMatrices], const void* row, bool transposed,
                          emulator::Site site) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix loads 1, 2 or 4");
  emulator::Row words{};
  if (emulator::lane() < 8 * kMatrices) {  // the addresses of other lanes are not used
    emulator::check_row(row, site);
    for (int i = 0; i < 4; i++) words.words[i] = static_cast<const volatile unsigned*>(row)[i];
  }
  emulator::load_matrices(r, kMatrices, transposed, words, site);
}
}  // namespace detail

template <int kMatrices>
inline void ldmatrix(unsigned (&r)[kMatrices], const void* row, emulator::Site site = {}) {
  detail::load_matrices(r, row, false, site);
}

template <int kMatrices>
inline void ldmatrix_trans(unsigned (&r)[kMatrices], const void* row, emulator::Site site = {}) {
  detail::load_matrices(r, row, true, site);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              emulator::Site site = {}) {
  emulator::multiply(emulator::Format::bf16, d, a, b, site);
}

inline void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             emulator::Site site = {}) {
  emulator::multiply(emulator::Format::f16, d, a, b, site);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             emulator::Site site = {}) {
  emulator::multiply(emulator::Format::tf32, d, a, b, site);
}

// ---- Numbers

inline unsigned pack_bf16(float low, float high) {
  return emulator::bf16_bits(low) | static_cast<unsigned>(emulator::bf16_bits(high)) << 16;
}
inline unsigned pack_f16(float low, float high) {
  return emulator::f16_bits(low) | static_cast<unsigned>(emulator::f16_bits(high)) << 16;
}
inline float from_f16(unsigned short bits) { return emulator::f16_value(bits); }
namespace detail {
// choose(a, b) of both halves; NaN if one of the two is.
template <class Choose>
inline unsigned of_bf16_halves(unsigned a, unsigned b, const Choose& choose) {
  const auto one = [&](unsigned x, unsigned y) {
    const float left = __uint_as_float(x << 16), right = __uint_as_float(y << 16);
    return left != left ? left : right != right ? right : choose(left, right);
  };
  return pack_bf16(one(a & 0xffff, b & 0xffff), one(a >> 16, b >> 16));
}
}  // namespace detail
inline unsigned min_bf16x2(unsigned a, unsigned b) {
  return detail::of_bf16_halves(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline unsigned max_bf16x2(unsigned a, unsigned b) {
  return detail::of_bf16_halves(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline unsigned to_tf32(float value) { return emulator::tf32_bits(value); }

inline float exp2_approx(float x) {
  return emulator::flush_subnormal(exp2f(emulator::flush_subnormal(x)));
}
inline float reciprocal_approx(float x) {
  return emulator::flush_subnormal(1.f / emulator::flush_subnormal(x));
}

// ---- Order between blocks

inline unsigned atomic_add_acq_rel(unsigned* address, unsigned value) {
  emulator::release(address);
  const unsigned before = atomicAdd(address, value);
  emulator::acquire(address);
  return before;
}

}  // namespace ptx
