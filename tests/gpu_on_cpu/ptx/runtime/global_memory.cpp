#include "global_memory.h"

#include "launch.h"

namespace ptx {

namespace {

constexpr int kSector = 32;

u64& requested(Traffic& t, Access kind) {
  return kind == Access::read ? t.loaded : kind == Access::write ? t.stored : t.atomic;
}

u64& sectors(Traffic& t, Access kind) {
  return kind == Access::read    ? t.loaded_sectors
         : kind == Access::write ? t.stored_sectors
                                 : t.atomic_sectors;
}

u64 distance(const Range& range, u64 address, int bytes) {
  if (address < range.begin) return range.begin - address;
  return address + bytes > range.end ? address + bytes - range.end : 0;
}

}  // namespace

GlobalMemory::GlobalMemory(Launch& launch, std::vector<Range> ranges, bool check_blocks)
    : launch_(launch), ranges_(std::move(ranges)), traffic_(ranges_.size()) {
  if (!check_blocks) return;
  for (const Range& range : ranges_) users_.emplace_back(range.end - range.begin);
}

int GlobalMemory::find(u64 address, int bytes, int lane) const {
  if (address % bytes)
    throw Fault("misaligned: " + std::to_string(bytes) + " bytes at an address that is " +
                    std::to_string(address % bytes) + " modulo " + std::to_string(bytes),
                lane);
  for (size_t r = 0; r < ranges_.size(); r++)
    if (address >= ranges_[r].begin && address + bytes <= ranges_[r].end) return int(r);
  out_of_bounds(address, bytes, lane);
}

void GlobalMemory::out_of_bounds(u64 address, int bytes, int lane) const {
  std::string message = "out of bounds: " + std::to_string(bytes) + " bytes that ";
  if (ranges_.empty()) throw Fault(message + "are in no argument", lane);
  const Range* nearest = &ranges_[0];
  for (const Range& range : ranges_)
    if (distance(range, address, bytes) < distance(*nearest, address, bytes)) nearest = &range;
  const std::string away = std::to_string(distance(*nearest, address, bytes));
  message += address < nearest->begin ? "begin " + away + " bytes before argument "
                                      : "end " + away + " bytes past the end of argument ";
  throw Fault(message + std::to_string(nearest->argument), lane);
}

void GlobalMemory::check_blocks(Warp& warp, int pc, u64 address, int range, int bytes,
                                Access kind) {
  const s32 me = launch_.block->number + 1;
  Users* users = users_[range].data() + (address - ranges_[range].begin);
  for (int b = 0; b < bytes; b++) {
    auto other = [&](s32 user) { return user && user != me; };
    Users& u = users[b];
    // Loads may meet loads and atomics, atomics may meet atomics; locks need that.
    s32 conflict = other(u.stored)                            ? u.stored
                   : kind == Access::write && other(u.loaded) ? u.loaded
                   : kind == Access::write && other(u.atomic) ? u.atomic
                                                              : 0;
    if (conflict)
      launch_.find(warp, {.hazard = Hazard::blocks,
                          .pc = pc,
                          .writes = kind != Access::read,
                          .other_writes = conflict == u.stored,
                          .other_block = conflict - 1});
    (kind == Access::read ? u.loaded : kind == Access::write ? u.stored : u.atomic) = me;
    if (conflict) return;
  }
}

void GlobalMemory::count_sectors(int pc, const u64* addresses, const int* ranges, u32 lanes,
                                 int bytes, Access kind) {
  std::array<u64, kLanes> seen;  // an access is no larger than a sector, and aligned
  int count = 0;
  for_lanes(lanes, [&](int lane) {
    u64 sector = addresses[lane] / kSector;
    if (count && seen[count - 1] == sector) return;
    if (std::find(seen.begin(), seen.begin() + count, sector) != seen.begin() + count) return;
    seen[count++] = sector;
    sectors(traffic_[ranges[lane]], kind) += kSector;
  });
  Counters& counters = launch_.counters[pc];
  counters.sectors += count;
  counters.ideal_sectors += (__builtin_popcount(lanes) * bytes + kSector - 1) / kSector;
}

std::array<u8*, kLanes> GlobalMemory::request(Warp& warp, int pc, const u64* addresses, u32 lanes,
                                              int bytes, Access kind) {
  std::array<int, kLanes> ranges;
  std::array<u8*, kLanes> pointers{};
  for_lanes(lanes, [&](int lane) {
    int r = ranges[lane] = find(addresses[lane], bytes, lane);
    pointers[lane] = reinterpret_cast<u8*>(addresses[lane] - ranges_[r].begin + ranges_[r].host);
    requested(traffic_[r], kind) += bytes;
    if (!users_.empty()) check_blocks(warp, pc, addresses[lane], r, bytes, kind);
  });
  launch_.counters[pc].requests++;
  count_sectors(pc, addresses, ranges.data(), lanes, bytes, kind);
  return pointers;
}

}  // namespace ptx
