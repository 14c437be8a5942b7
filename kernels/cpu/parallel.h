// Workers over threads. Each thread owns one arena, allocated before anything is written, so that
// running out of memory leaves all outputs untouched.
#pragma once
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

// Memory that is freed with the call. `ok` is false if there was none.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data(nullptr) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, sizeof(float) * (size_t)at_least(floats, 16)) == 0) data = (float*)p;
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool ok() const { return data != nullptr; }
  float* data;
};

// First prepare(), then body(worker, arena) for each worker; `floats` is what a worker takes from
// its arena.
template <class Body, class Prepare>
static inline int run_workers(int64_t workers, int64_t floats, int64_t work, Body body,
                              Prepare prepare) {
  const int threads = thread_count(workers, work);
  const int64_t size =
      (floats + 1023) / 1024 * 1024 + 16 * 64;  // take() rounds each piece up to a cache line
  Buffer memory(size * threads);
  if (!memory.ok()) return LOL_ENOMEM;
  prepare();
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
#endif
  for (int64_t w = 0; w < workers; w++) body(w, Arena{memory.data + size * thread_index()});
  return LOL_OK;
}
template <class Body>
static inline int run_workers(int64_t workers, int64_t floats, int64_t work, Body body) {
  return run_workers(workers, floats, work, body, [] {});
}

}  // namespace LOL_ISA
}  // namespace lol
