// Barriers, shuffles and votes of a warp.
#include "machine.h"

namespace emulator {

int lane() { return current->lane(); }

void warp_barrier(unsigned mask, Site site) {
  const int warp = current->warp(), lowest = std::countr_zero(mask);
  if (mask == 0) fault(site, "__syncwarp: the mask is empty");
  const unsigned passed = block->warp_barriers[warp][lowest];
  const void* address = block->memory.barrier_address(warp, lowest, passed);
  release(address);
  meet({"__syncwarp", site, mask, false, nullptr, nullptr});
  acquire(address);
  block->warp_barriers[warp][lowest] = passed + 1;
}

unsigned shuffle(unsigned mask, unsigned bits, int source, const char* name, Site site) {
  struct Lane {
    unsigned bits, result;
    int source;
  } mine{bits, 0, source};
  if (source < 0 || source >= kLanes || !(mask >> source & 1))
    fault(site, "%s: the mask %08x lacks lane %d, which it reads", name, mask, source);
  meet({name, site, mask, false,
        [](const std::array<void*, kLanes>& brought, unsigned members) {
          for (int l = 0; l < kLanes; l++) {
            if (!(members >> l & 1)) continue;
            auto* lane = static_cast<Lane*>(brought[l]);
            lane->result = static_cast<Lane*>(brought[lane->source])->bits;
          }
        },
        &mine});
  return mine.result;
}

unsigned ballot(unsigned mask, bool predicate, const char* name, Site site) {
  struct Lane {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  meet({name, site, mask, false,
        [](const std::array<void*, kLanes>& brought, unsigned members) {
          unsigned votes = 0;
          for (int l = 0; l < kLanes; l++)
            if (members >> l & 1)
              votes |= static_cast<unsigned>(static_cast<Lane*>(brought[l])->predicate) << l;
          for (int l = 0; l < kLanes; l++)
            if (members >> l & 1) static_cast<Lane*>(brought[l])->result = votes;
        },
        &mine});
  return mine.result;
}

}  // namespace emulator
