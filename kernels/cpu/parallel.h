// Workers over threads. Each thread owns one arena, allocated before anything is written, so that
// running out of memory leaves all outputs untouched.
#pragma once
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
  return (int)at_least(at_most(omp_get_max_threads(), useful), 1);
#else
  (void)workers, (void)work;
  return 1;
#endif
}
static inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Threads of the region at hand: fewer than were asked for where that is one of another's threads,
// or OMP_THREAD_LIMIT says so.
static inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Where the threads of a region wait for each other. They spin while the others are likely to be at
// work, for some microseconds, then let them: where another process has a core, two of them share
// one, and OpenMP's barrier spins whole time slices away, 4 ms each.
class Meeting {
 public:
  void wait() {
    const int64_t meeting = __atomic_load_n(&meetings_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == team_size()) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&meetings_, meeting + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int i = 0; __atomic_load_n(&meetings_, __ATOMIC_ACQUIRE) == meeting; i++) {
      if (i >= SPINS) sched_yield();
    }
  }

 private:
  static constexpr int SPINS = 1 << 14;
  int64_t meetings_ = 0;
  int arrived_ = 0;
};

// The numbers [0, count), each for one thread of a region: first those of its own share, which are
// neighbours and so use data that it has in its caches, then what others have not come to.
class Shares {
 public:
  static int64_t floats(int threads) { return threads * (int64_t)(sizeof(Line) / sizeof(float)); }
  Shares(int threads, float* memory) : threads_(threads), next_((Line*)memory) { restart(); }
  void restart() {
    for (int t = 0; t < threads_; t++) __atomic_store_n(&next_[t].taken, 0, __ATOMIC_RELAXED);
  }
  // The next number for thread t, or -1.
  int64_t next(int64_t t, int64_t count) {
    for (int i = 0; i < threads_; i++) {
      const int64_t of = (t + i) % threads_, first = count * of / threads_;
      const int64_t number = first + __atomic_fetch_add(&next_[of].taken, 1, __ATOMIC_RELAXED);
      if (number < count * (of + 1) / threads_) return number;
    }
    return -1;
  }

 private:
  struct Line {  // of the cache
    int64_t taken, unused[7];
  };
  int threads_;
  Line* next_;
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

// First prepare(), then body(worker, arena) for each worker; `floats` is what a worker takes from
// its arena.
template <class Body, class Prepare>
static inline int run_workers(int64_t workers, int64_t floats, int64_t work, Body body,
                              Prepare prepare) {
  const int threads = thread_count(workers, work);
  const int64_t size = floats + 16 * 64;  // take() rounds each piece up to a cache line
  const bool on_stack = size <= ON_STACK;
  const int64_t shared = (size + 1023) / 1024 * 1024;
  Buffer memory(on_stack ? 0 : shared * threads);
  if (!memory.ok()) return LOL_ENOMEM;
  prepare();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
    const MatrixUnit unit{};
    alignas(64) float own[ON_STACK];
    float* scratch = on_stack ? own : memory.data + shared * thread_index();
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1) nowait
#endif
    for (int64_t w = 0; w < workers; w++) body(w, Arena{scratch});
  }
  return LOL_OK;
}
template <class Body>
static inline int run_workers(int64_t workers, int64_t floats, int64_t work, Body body) {
  return run_workers(workers, floats, work, body, [] {});
}

}  // namespace LOL_ISA
}  // namespace lol
