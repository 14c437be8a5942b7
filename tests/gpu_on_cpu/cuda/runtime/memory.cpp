#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "machine.h"
#include "sanitizers.h"

namespace emulator {
namespace {

constexpr std::size_t kPage = 4096;

bool is_inside(const Range& range, const char* first, std::size_t bytes) {
  return range.begin <= first && first + bytes <= range.end;
}

// Whether the program or library is the one that has the kernels, and this.
bool is_own(const dl_phdr_info& info) {
  const auto here = reinterpret_cast<std::uintptr_t>(&is_own);
  return std::any_of(info.dlpi_phdr, info.dlpi_phdr + info.dlpi_phnum, [&](const auto& header) {
    return header.p_type == PT_LOAD && here - info.dlpi_addr - header.p_vaddr < header.p_memsz;
  });
}

// Its static variables: those of this thread and, for the address sanitizer, which does not guard
// these, all others.
Range static_variables() {
  Range found{};
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* result) {
        if (!is_own(*info)) return 0;
        Range& range = *static_cast<Range*>(result);
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& header = info->dlpi_phdr[i];
          auto* segment = reinterpret_cast<char*>(info->dlpi_addr + header.p_vaddr);
          auto* variables = static_cast<char*>(info->dlpi_tls_data);
          if (__asan_poison_memory_region && header.p_type == PT_LOAD && header.p_flags & PF_W)
            range = {segment, segment + header.p_memsz};
          if (!__asan_poison_memory_region && header.p_type == PT_TLS)
            range = {variables, variables + header.p_memsz};
        }
        return 1;
      },
      &found);
  return found;
}

std::size_t whole_pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

char* new_pages(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) fail("no memory for a block");
  return static_cast<char*>(pages);
}

// Those of the last block. As many threads and bytes mean the same places for everything.
struct {
  char* pages;
  std::size_t bytes;
  int threads;
} kept;

}  // namespace

BlockMemory::BlockMemory(std::size_t shared_bytes, int threads)
    : statics_(static_variables()), shared_bytes_(shared_bytes), threads_(threads) {
  const std::size_t barriers = whole_pages(sizeof(double) * 2 * kLanes * (1 + kMaxWarps));
  const std::size_t shared = whole_pages(shared_bytes) + kPage;  // one more catches overruns
  const std::size_t copies = whole_pages(threads * kMaxCopies * sizeof(Copy));
  page_bytes_ = barriers + kPage + shared + threads * kStackBytes + copies;
  const bool reused = kept.pages && kept.bytes == page_bytes_ && kept.threads == threads;
  pages_ = reused ? std::exchange(kept.pages, nullptr) : new_pages(page_bytes_);
  shared_ = pages_ + barriers + kPage;
  stacks_ = shared_ + shared;
  copies_ = reinterpret_cast<Copy*>(stacks_ + threads * kStackBytes);
  if (!reused) {
    mprotect(shared_ - kPage, kPage, PROT_NONE);
    for (int i = 0; i < threads; i++) mprotect(stack(i), kPage, PROT_NONE);
  }

  // Whoever reads shared memory before it is written reads NaN. Other static variables than the
  // thread's own have red zones, which are the address sanitizer's.
  std::memset(shared_, 0xff, shared_bytes);
  if (!__asan_poison_memory_region && statics_.begin)
    std::memset(statics_.begin, 0xff, statics_.end - statics_.begin);
  poison(shared_ + shared_bytes, shared - shared_bytes);
}

BlockMemory::~BlockMemory() {
  unpoison(pages_, page_bytes_);
  if (kept.pages) munmap(kept.pages, kept.bytes);
  kept = {pages_, page_bytes_, threads_};
  if (!__tsan_acquire) return;
  munmap(kept.pages, kept.bytes);
  kept.pages = nullptr;
}

bool BlockMemory::is_shared(const void* pointer, std::size_t bytes) const {
  const auto* first = static_cast<const char*>(pointer);
  return is_inside({shared_, shared_ + shared_bytes_}, first, bytes) ||
         is_inside(statics_, first, bytes);
}

const void* BlockMemory::barrier_address(int warp, int lane, unsigned parity) const {
  return pages_ + sizeof(double) * (2 * (kLanes * (1 + warp) + lane) + parity % 2);
}

}  // namespace emulator
