// Lines of memory that a thread will want soon, asked for one at a time in the midst of its
// products: more would wait for line buffers, of which a core has some 16, and the thread with
// them.
#pragma once
#include "matrix_unit.h"

namespace lol {
namespace LOL_ISA {

// How near: into L1, which on AMD's Zen 4 takes 0.98 of the time that L2 does; or into L2 in the
// sets of Intel's CPUs with AVX-512, on which nothing else has been measured.
#if defined(__AVX512F__) && (!defined(__AVX512BF16__) || defined(LOL_MATRIX_UNIT))
constexpr int NEAR = 2;
#else
constexpr int NEAR = 3;
#endif

// Rows that are asked for from the first on, line by line: a product takes a copy, asks while it
// runs, and says how far it came.
struct WantedRows {
  static constexpr int LINE = 64;

  // Addresses as numbers, since a product goes on past the last row, by so many lines as it has
  // turns left. Asking for what is not there does nothing.
  uintptr_t line, row_end, end;
  int64_t stride, to_next_row;  // between rows; past the last line of one
  int64_t at_once;              // lines

  static WantedRows at(const char* first, int64_t stride, int64_t count, int64_t bytes) {
    if (stride <= bytes) {  // one behind the other; or on top of each other: one has to do
      if (stride == bytes) bytes *= count;
      stride = bytes;
      count = 1;
    }
    const uintptr_t line = (uintptr_t)first, row_end = line + (uintptr_t)bytes;
    return {line,
            row_end,
            row_end + (uintptr_t)(stride * (count - 1)),
            stride,
            stride - (bytes + LINE - 1) / LINE * LINE,
            1};
  }
  // The same line again and again.
  static WantedRows none(const void* line) {
    return {(uintptr_t)line, 0, UINTPTR_MAX, 0, -LINE, 1};
  }
  bool are_none() const { return end == UINTPTR_MAX; }

  void ask() {
    ask_for_one();
    for (int64_t i = 1; i < at_once; i++) ask_for_one();
  }
  bool asked() const { return line >= end; }

 private:
  void ask_for_one() {
    __builtin_prefetch((const char*)line, 0, NEAR);
    line += LINE;
    if (line < row_end) return;
    line += (uintptr_t)to_next_row;
    row_end += (uintptr_t)stride;
  }
};

class Requests {
 public:
  // What a call leaves behind is asked for in the next: that costs little and does no harm.
  static Requests& of_thread() {
    static thread_local Requests requests;
    return requests;
  }

  // First in, first out; if there are more than are asked for in time, the first ones are, at once.
  void add(const WantedRows& rows) {
    if (count_ == MOST) {
      while (!at_hand_.asked()) at_hand_.ask();
      next();
    }
    waiting_[(first_ + count_++) % MOST] = rows;
    if (at_hand_.are_none()) next();
  }

  WantedRows& at_hand() {
    if (at_hand_.asked()) next();
    return at_hand_;
  }

 private:
  friend class Pace;
  __attribute__((noinline)) void next() {
    if (count_ == 0) {
      at_hand_ = WantedRows::none(this);
      return;
    }
    at_hand_ = waiting_[first_];
    at_hand_.at_once += more_;
    first_ = (first_ + 1) % MOST;
    count_--;
  }

  static constexpr int MOST = 8;  // tiles
  WantedRows at_hand_, waiting_[MOST];
  int first_, count_;
  int64_t more_;  // lines at once than one
};

// How many lines at once the products of this thread ask for, as long as it lives.
class Pace {
 public:
  explicit Pace(int64_t lines) { Requests::of_thread().more_ = lines - 1; }
  ~Pace() { Requests::of_thread().more_ = 0; }
  Pace(const Pace&) = delete;
  Pace& operator=(const Pace&) = delete;
};

}  // namespace LOL_ISA
}  // namespace lol
