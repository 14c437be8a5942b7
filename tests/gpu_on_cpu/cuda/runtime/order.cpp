// Fences, and atomics beside them.
#include <algorithm>

#include "machine.h"

namespace emulator {

void fence() {
  for (const void* address : current->atomics) acquire(address);
  current->atomics.clear();
  current->fenced = true;
}

void before_atomic(const void* address) {
  if (current->fenced) release(address);
  current->fenced = false;
}

void after_atomic(const void* address) {
  auto& seen = current->atomics;
  if (std::find(seen.begin(), seen.end(), address) != seen.end()) return;
  if (seen.size() == seen.capacity()) seen.erase(seen.begin());  // a fence orders the newest ones
  seen.push_back(address);
}

}  // namespace emulator
