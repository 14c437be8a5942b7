// Global memory: the arguments of a launch, nothing else. Kernels see them at addresses of their
// own, far from each other, so that what runs past the end of one does not end up in another.
#pragma once

#include "machine.h"

namespace ptx {

// Per argument, over all blocks; laid out by report.py. Sectors in bytes: 32 for each that a
// request touches, however little of it.
struct Traffic {
  u64 loaded, stored, atomic;
  u64 loaded_sectors, stored_sectors, atomic_sectors;
};

struct Range {
  u64 begin, end;  // as the kernel sees it
  u64 host;        // where `begin` is
  s32 argument;
};

class GlobalMemory {
 public:
  GlobalMemory(Launch& launch, std::vector<Range> ranges, bool check_blocks);

  // One request of a warp: bounds, alignment, traffic, and who else touched the bytes. Returns
  // where they are.
  std::array<u8*, kLanes> request(Warp& warp, int pc, const u64* addresses, u32 lanes, int bytes,
                                  Access kind);
  const std::vector<Traffic>& traffic() const { return traffic_; }

 private:
  int find(u64 address, int bytes, int lane) const;
  [[noreturn]] void out_of_bounds(u64 address, int bytes, int lane) const;
  void check_blocks(Warp& warp, int pc, u64 address, int range, int bytes, Access kind);
  void count_sectors(int pc, const u64* addresses, const int* ranges, u32 lanes, int bytes,
                     Access kind);

  // Which blocks have touched a byte, as their number plus one; 0 for none.
  struct Users {
    s32 stored, loaded, atomic;
  };
  Launch& launch_;
  std::vector<Range> ranges_;
  std::vector<Traffic> traffic_;
  std::vector<std::vector<Users>> users_;  // empty unless asked for
};

}  // namespace ptx
