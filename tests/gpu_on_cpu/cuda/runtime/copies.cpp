// cp.async.
#include <algorithm>

#include "machine.h"
#include "sanitizers.h"

namespace emulator {

void check_copy(const Copy& copy, Site site) {
  const auto misaligned = [&](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<unsigned>(copy.bytes) != 0;
  };
  const auto bytes = static_cast<std::size_t>(copy.bytes);
  if (copy.source_bytes < 0 || copy.source_bytes > copy.bytes)
    fault(site, "cp.async of %d bytes from %d", copy.bytes, copy.source_bytes);
  if (misaligned(copy.shared)) fault(site, "cp.async: misaligned destination");
  if (misaligned(copy.global)) fault(site, "cp.async: misaligned source");
  if (!block->memory.is_shared(copy.shared, bytes))
    fault(site, "cp.async: the destination is not inside of shared memory");
  if (block->memory.is_shared(copy.global, 1)) fault(site, "cp.async: the source is shared memory");
  for (std::size_t i = 0; i < current->in_flight; i++) {  // these may land in any order
    const Copy& other = current->copies[(current->oldest + i) % kMaxCopies];
    const char *begin = static_cast<const char*>(copy.shared),
               *theirs = static_cast<const char*>(other.shared);
    if (begin < theirs + other.bytes && theirs < begin + copy.bytes)
      fault(site, "cp.async: another copy to the same bytes is in flight");
  }
  if (current->in_flight == kMaxCopies)
    fault(site, "cp.async: more than %zu in flight in one thread", current->in_flight);
}

void issue(const Copy& copy) {
  Copy& issued = current->copies[(current->oldest + current->in_flight++) % kMaxCopies];
  issued = copy;
  issued.group = current->open_group;
  poison(copy.shared, static_cast<std::size_t>(copy.bytes));
}

void commit_copies() { current->open_group++; }

bool land_copy(int groups, Copy* copy) {
  const Copy& next = current->copies[current->oldest];
  if (current->in_flight == 0 || next.group >= current->open_group - groups) return false;
  *copy = next;
  current->oldest = (current->oldest + 1) % kMaxCopies;
  current->in_flight--;
  unpoison(copy->shared, static_cast<std::size_t>(copy->bytes));
  return true;
}

}  // namespace emulator
