#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"
#include "sanitizers.h"

namespace emulator {
namespace {

constexpr std::size_t kPage = 4096;

struct Range {
  char *begin, *end;
  bool contains(const char* first, const char* last) const { return begin <= first && last <= end; }
};

// What the executable has of static variables: those of this thread, and its loaded segments.
struct Image {
  Range thread_local_variables{};
  std::vector<Range> segments;

  Image() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* self) {
          static_cast<Image*>(self)->read(*info);
          return 1;  // the first is the executable
        },
        this);
  }

  void read(const dl_phdr_info& info) {
    for (int i = 0; i < info.dlpi_phnum; i++) {
      const auto& header = info.dlpi_phdr[i];
      if (header.p_type == PT_TLS) {
        auto* begin = static_cast<char*>(info.dlpi_tls_data);
        thread_local_variables = {begin, begin + header.p_memsz};
      } else if (header.p_type == PT_LOAD) {
        auto* begin = reinterpret_cast<char*>(info.dlpi_addr + header.p_vaddr);
        segments.push_back({begin, begin + header.p_memsz});
      }
    }
  }
};

std::size_t whole_pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

BlockMemory::BlockMemory(std::size_t shared_bytes, int threads) : shared_bytes_(shared_bytes) {
  const std::size_t barriers = whole_pages(sizeof(double) * 2 * kLanes * (1 + kMaxWarps));
  const std::size_t shared =
      whole_pages(shared_bytes) + kPage;  // a page behind it catches overruns
  page_bytes_ = barriers + kPage + shared + threads * kStackBytes;
  void* pages = mmap(nullptr, page_bytes_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) fail("no memory for a block");
  pages_ = static_cast<char*>(pages);
  shared_ = pages_ + barriers + kPage;
  stacks_ = shared_ + shared;
  mprotect(shared_ - kPage, kPage, PROT_NONE);
  for (int i = 0; i < threads; i++) mprotect(stack(i), kPage, PROT_NONE);

  // Whoever reads shared memory before it is written reads NaN.
  std::memset(shared_, 0xff, shared_bytes);
  const Range statics = Image().thread_local_variables;
  if (statics.begin) std::memset(statics.begin, 0xff, statics.end - statics.begin);
  poison(shared_ + shared_bytes, shared - shared_bytes);
}

BlockMemory::~BlockMemory() {
  unpoison(pages_, page_bytes_);
  munmap(pages_, page_bytes_);
}

bool BlockMemory::is_shared(const void* pointer, std::size_t bytes) const {
  const auto* first = static_cast<const char*>(pointer);
  const auto* last = first + bytes;
  if (Range{shared_, shared_ + shared_bytes_}.contains(first, last)) return true;
  const Image image;
  if (image.thread_local_variables.contains(first, last)) return true;
  for (const Range& segment : image.segments)  // builds for the address sanitizer keep it there
    if (__asan_poison_memory_region && segment.contains(first, last)) return true;
  return false;
}

const void* BlockMemory::barrier_address(int warp, int lane, unsigned parity) const {
  return pages_ + sizeof(double) * (2 * (kLanes * (1 + warp) + lane) + parity % 2);
}

}  // namespace emulator
