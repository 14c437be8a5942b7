// Workers over threads. Each thread owns one arena, allocated before anything is written, so that
// running out of memory leaves all outputs untouched.
#pragma once
#include <fenv.h>
#include <sched.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include "tokens.h"

namespace lol {
namespace LOL_ISA {

// Multiply-adds that are worth a thread: 4 us of a decode step, which streams its state, about what
// a barrier between threads that are awake costs.
constexpr int64_t THREAD_WORK = 1 << 16;

static inline int thread_count(int64_t workers, int64_t work) {
#ifdef _OPENMP
  const int64_t useful = at_most(workers, work / THREAD_WORK);
  const int threads = (int)at_least(at_most(omp_get_max_threads(), useful), 1);
  return threads > 1 && may_use_threads() ? threads : 1;
#else
  (void)workers, (void)work;
  return 1;
#endif
}
// How many runs are left over when every thread has had equally many; 0 if no more than a part
// `idle` of the threads would have none of them.
static inline int64_t left_over(int64_t runs, int threads, double idle) {
  const int64_t rest = runs % threads;
  return (double)rest < (1.0 - idle) * threads ? rest : 0;
}
static inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// How a thread computes, such as whether it flushes denormals. On x86-64 fenv.h changes the x87's
// part of it as well, which vectors do not use and which takes 0.2 us of a parallel region.
#ifdef __SSE__
using FloatMode = unsigned;
static inline FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
static inline void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
#else
using FloatMode = fenv_t;
static inline FloatMode float_mode() {
  fenv_t mode;
  fegetenv(&mode);
  return mode;
}
static inline void set_float_mode(const FloatMode& mode) { fesetenv(&mode); }
#endif

// While one is alive its thread computes as the caller of a parallel region does. Threads of a pool
// would keep what they began with, and a result depend on who computed it.
class AsCaller {
 public:
  explicit AsCaller(const FloatMode& callers) : own_(float_mode()) { set_float_mode(callers); }
  ~AsCaller() { set_float_mode(own_); }
  AsCaller(const AsCaller&) = delete;
  AsCaller& operator=(const AsCaller&) = delete;

 private:
  const FloatMode own_;
};

// What threads do one after the other, in order. They spin while the one before is likely to be at
// work, for some microseconds, then give way: where another process has a core, two of them share
// one, and spinning would take whole time slices, 4 ms each.
class Turns {
 public:
  void wait_for(int64_t turn) const {
    for (int i = 0; __atomic_load_n(&turn_, __ATOMIC_ACQUIRE) != turn; i++) {
      if (i >= SPINS) sched_yield();
    }
  }
  void pass_on() { __atomic_store_n(&turn_, turn_ + 1, __ATOMIC_RELEASE); }

 private:
  static constexpr int SPINS = 1 << 14;
  alignas(64) int64_t turn_ = 0;
};

// Memory that is freed with the call. `ok` is false if some was asked for and there was none.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data(nullptr), wanted_(floats > 0) {
    void* p = nullptr;
    if (wanted_ && posix_memalign(&p, 64, sizeof(float) * (size_t)floats) == 0) data = (float*)p;
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool ok() const { return data || !wanted_; }
  float* data;

 private:
  bool wanted_;
};

// Scratch of a worker that lives on its thread's stack, in floats: enough for a decode step with
// heads of 64, a window of 128 and groups of 8. Where a worker needs more, threads share a block of
// the heap.
constexpr int64_t ON_STACK = 4096;

// Who runs a worker: a thread that has nothing to do, or the same one in every call of as many
// threads, so that what a worker writes is near when the next call comes.
enum class Threads { any, same };

// The arenas of up to so many threads; `floats` is what a worker takes from its own.
class Arenas {
 public:
  Arenas(int threads, int64_t floats)
      : size_((floats + SLACK + 1023) / 1024 * 1024),
        on_stack_(floats + SLACK <= ON_STACK),
        memory_(on_stack_ ? 0 : size_ * threads) {}
  bool ok() const { return memory_.ok(); }
  // The calling thread's.
  float* of_thread(float* on_stack) const {
    return on_stack_ ? on_stack : memory_.data + size_ * thread_index();
  }

 private:
  static constexpr int64_t SLACK = 16 * 64;  // take() rounds each piece up to a cache line
  int64_t size_;
  bool on_stack_;
  Buffer memory_;
};

// body(worker, arena) for each worker, by no more threads than there are arenas.
template <Threads who = Threads::any, class Body>
static inline void run_workers(const Arenas& arenas, int threads, int64_t workers, Body body) {
  if (workers == 0) return;
  [[maybe_unused]] const int busy = (int)at_most(threads, workers);
  const FloatMode mode = float_mode();
#ifdef _OPENMP
#pragma omp parallel num_threads(busy)
#endif
  {
    const AsCaller computing(mode);
    [[maybe_unused]] const MatrixUnit unit{};
    alignas(64) float own[ON_STACK];
    float* scratch = arenas.of_thread(own);
    if constexpr (who == Threads::same) {
#ifdef _OPENMP
#pragma omp for schedule(static) nowait
#endif
      for (int64_t w = 0; w < workers; w++) body(w, Arena{scratch});
    } else {
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1) nowait
#endif
      for (int64_t w = 0; w < workers; w++) body(w, Arena{scratch});
    }
  }
}
// First prepare(), then that, by as many threads as are worth it.
template <Threads who = Threads::any, class Body, class Prepare>
static inline int run_workers(int64_t workers, int64_t floats, int64_t work, Body body,
                              Prepare prepare) {
  const int threads = thread_count(workers, work);
  const Arenas arenas(threads, floats);
  if (!arenas.ok()) return LOL_ENOMEM;
  prepare();
  run_workers<who>(arenas, threads, workers, body);
  return LOL_OK;
}
template <class Body>
static inline int run_workers(int64_t workers, int64_t floats, int64_t work, Body body) {
  return run_workers(workers, floats, work, body, [] {});
}

}  // namespace LOL_ISA
}  // namespace lol
