// Lines of memory that a thread will want soon, asked for a few at a time in the midst of its
// products: all at once, a tile's 128 would wait for line buffers, of which a core has some 16, and
// the thread with them.
#pragma once
#include "simd.h"

namespace lol {
namespace LOL_ISA {

class Requests {
 public:
  // What a call leaves behind is asked for in the next: that costs little and does no harm.
  static Requests& of_thread() {
    static thread_local Requests requests;
    return requests;
  }

  // Of so many rows, `stride` bytes apart. First in, first out; if there are more than are asked
  // for in time, the first ones are, at once.
  void add(const char* row, int64_t stride, int64_t rows, int64_t bytes) {
    if (count_ == MOST) ask(lines_ + rows_[first_].count * rows_[first_].lines);
    const Rows& last =
        rows_[(first_ + count_++) % MOST] = {row, stride, (int)rows, (int)((bytes + 63) / 64)};
    pending_ += last.count * last.lines;
  }

  // Before each tile of a product that registers hold, of which a block has 50 to 200: by the end
  // of a block, nearly all of the 500 to 1000 lines that it added are under way.
  void ask_some() {
    if (pending_ > 0) ask(pending_ < 256 ? pending_ / 16 + 1 : 16);
  }

 private:
  void ask(int lines) {
    for (; lines > 0; lines--) {
      if (lines_ == 0) {
        if (count_ == 0) return;
        Rows& rows = rows_[first_];
        line_ = rows.row;
        lines_ = rows.lines;
        rows.row += rows.stride;
        if (--rows.count == 0) first_ = (first_ + 1) % MOST, count_--;
      }
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      lines_--;
      pending_--;
    }
  }

  struct Rows {
    const char* row;
    int64_t stride;
    int count, lines;
  };
  static constexpr int MOST = 8;  // tiles
  Rows rows_[MOST];
  int first_, count_, pending_;  // pending lines
  const char* line_;             // of the row at hand
  int lines_;
};

}  // namespace LOL_ISA
}  // namespace lol
