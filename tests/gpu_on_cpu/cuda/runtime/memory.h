// The memory of a block: its shared memory and the stacks of its threads.
#pragma once

#include <cstddef>

namespace emulator {

struct Range {
  char *begin, *end;
};

// New pages for each block: to the thread sanitizer, what is reused carries its past with it.
class BlockMemory {
 public:
  BlockMemory(std::size_t shared_bytes, int threads);
  ~BlockMemory();
  BlockMemory(const BlockMemory&) = delete;

  // The address sanitizer's frames are large.
  static constexpr std::size_t kStackBytes = 256 << 10;
  char* stack(int thread) const { return stacks_ + thread * kStackBytes; }
  char* shared() const { return shared_; }
  bool is_shared(const void* pointer, std::size_t bytes) const;
  // Addresses that stand for barriers; see Block.
  const void* barrier_address(int warp, int lane, unsigned parity) const;

 private:
  char *pages_, *shared_, *stacks_;
  Range statics_;  // where static shared memory is
  std::size_t page_bytes_, shared_bytes_;
};

}  // namespace emulator
