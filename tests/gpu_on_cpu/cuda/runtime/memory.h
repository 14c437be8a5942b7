// The memory of a block: its shared memory, the stacks of its threads, their asynchronous copies.
#pragma once

#include <cstddef>

#include "emulator/runtime.h"

namespace emulator {

struct Range {
  char *begin, *end;
};

constexpr std::size_t kMaxCopies = 1024;  // of a thread, in flight

// The pages of the block before, which saves most of a small block's time; new ones where there is
// the thread sanitizer: to it, what is reused carries its past with it.
class BlockMemory {
 public:
  BlockMemory(std::size_t shared_bytes, int threads);
  ~BlockMemory();
  BlockMemory(const BlockMemory&) = delete;

  // The address sanitizer's frames are large.
  static constexpr std::size_t kStackBytes = 256 << 10;
  char* stack(int thread) const { return stacks_ + thread * kStackBytes; }
  Copy* copies(int thread) const { return copies_ + thread * kMaxCopies; }
  char* shared() const { return shared_; }
  bool is_shared(const void* pointer, std::size_t bytes) const;
  // Addresses that stand for barriers; see Block.
  const void* barrier_address(int warp, int lane, unsigned parity) const;

 private:
  char *pages_, *shared_, *stacks_;
  Copy* copies_;
  Range statics_;  // where static shared memory is
  std::size_t page_bytes_, shared_bytes_;
  int threads_;
};

}  // namespace emulator
