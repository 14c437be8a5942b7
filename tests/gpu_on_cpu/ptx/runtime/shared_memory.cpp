#include "shared_memory.h"

#include "launch.h"

namespace ptx {

SharedMemory::SharedMemory(Launch& launch, int bytes, bool check)
    : launch_(launch), checks_(check), bytes_(bytes) {
  for (int w = 0; w < kMaxWarps; w++) clocks_[w][w] = 1;
  if (!check) return;
  int warps = (launch.threads() + kLanes - 1) / kLanes, chunks = (bytes + kChunk - 1) / kChunk;
  written_.resize(bytes);
  writer_.resize(bytes);
  atomically_.resize(bytes);
  read_.assign(warps, std::vector<Stamp>(bytes));
  copying_.resize(bytes);
  operand_uses_.resize(chunks);
  operand_pc_.resize(chunks);
  stored_.resize(chunks);
  storer_.resize(chunks);
  store_pc_.resize(chunks);
}

void SharedMemory::begin_block() {
  std::fill(bytes_.begin(), bytes_.end(), u8(0xff));
  std::fill(copying_.begin(), copying_.end(), 0);
  std::fill(operand_uses_.begin(), operand_uses_.end(), u16(0));
  std::fill(stored_.begin(), stored_.end(), u64(0));
  std::vector<int> all(kMaxWarps);
  for (int w = 0; w < kMaxWarps; w++) all[w] = w;
  synchronise(all);  // the block before has ended
}

void SharedMemory::synchronise(const std::vector<int>& warps) {
  std::array<u32, kMaxWarps> joined{};
  for (int w : warps)
    for (int v = 0; v < kMaxWarps; v++) joined[v] = std::max(joined[v], clocks_[w][v]);
  for (int w : warps) {
    clocks_[w] = joined;
    clocks_[w][w]++;
  }
}

SharedMemory::Stamp SharedMemory::now(const Warp& warp, int pc) const {
  return Stamp(clocks_[warp.index][warp.index]) << 32 | u32(pc);
}

bool SharedMemory::unordered(const Warp& warp, int other, Stamp stamp) const {
  return other != warp.index && u32(stamp >> 32) > clocks_[warp.index][other];
}

void SharedMemory::check(u64 address, int bytes, int lane) const {
  if (address % bytes)
    throw Fault("misaligned: " + std::to_string(bytes) + " bytes at shared address " +
                    std::to_string(address),
                lane);
  if (address + bytes > bytes_.size())
    throw Fault("out of bounds: shared address " + std::to_string(address) + " + " +
                    std::to_string(bytes) + " bytes of " + std::to_string(bytes_.size()),
                lane);
}

void SharedMemory::check_against_writes(Warp& warp, int pc, u32 address, int bytes, Access kind,
                                        const u8* value) {
  for (int b = 0; b < bytes; b++) {
    const u32 at = address + b;
    bool both_atomic = kind == Access::atomic && atomically_[at];
    if (both_atomic || !unordered(warp, writer_[at], written_[at])) continue;
    bool same = value && value[b] == bytes_[at];
    launch_.find(warp, {.hazard = same ? Hazard::duplicate : Hazard::race,
                        .pc = pc,
                        .other_pc = s32(u32(written_[at])),
                        .other_warp = writer_[at],
                        .writes = kind != Access::read,
                        .other_writes = true,
                        .address = at});
    if (!same) return;
  }
}

void SharedMemory::check_against_reads(Warp& warp, int pc, u32 address, int bytes) {
  for (int other = 0; other < int(read_.size()); other++) {
    if (other == warp.index) continue;
    const Stamp* stamps = read_[other].data() + address;
    Stamp latest = *std::max_element(stamps, stamps + bytes);
    if (unordered(warp, other, latest))
      launch_.find(warp, {.hazard = Hazard::race,
                          .pc = pc,
                          .other_pc = s32(u32(latest)),
                          .other_warp = other,
                          .writes = true,
                          .address = address});
  }
}

void SharedMemory::check_in_flight(Warp& warp, int pc, u32 address, int bytes, bool writes) {
  for (u32 b = address; b < address + bytes; b++)
    if (copying_[b])
      return launch_.find(warp, {.hazard = Hazard::copy,
                                 .pc = pc,
                                 .other_pc = copying_[b] - 1,
                                 .writes = writes,
                                 .other_writes = true,
                                 .address = b});
  if (!writes) return;
  for (u32 c = address / kChunk; c <= (address + bytes - 1) / kChunk; c++)
    if (operand_uses_[c])
      return launch_.find(warp, {.hazard = Hazard::operand,
                                 .pc = pc,
                                 .other_pc = operand_pc_[c],
                                 .writes = true,
                                 .address = address});
}

void SharedMemory::note(Warp& warp, int pc, u32 address, int bytes, Access kind) {
  Stamp stamp = now(warp, pc);
  if (kind == Access::read) {
    std::fill_n(read_[warp.index].begin() + address, bytes, stamp);
    return;
  }
  std::fill_n(written_.begin() + address, bytes, stamp);
  std::fill_n(writer_.begin() + address, bytes, u8(warp.index));
  std::fill_n(atomically_.begin() + address, bytes, u8(kind == Access::atomic));
  ++serial_;
  for (u32 c = address / kChunk; c <= (address + bytes - 1) / kChunk; c++) {
    stored_[c] = serial_;
    storer_[c] = u8(warp.index);
    store_pc_[c] = pc;
  }
}

void SharedMemory::access(Warp& warp, int pc, int lane, u64 address, int bytes, Access kind,
                          const u8* value) {
  check(address, bytes, lane);
  if (!checks_) return;
  bool writes = kind != Access::read;
  check_in_flight(warp, pc, u32(address), bytes, writes);
  check_against_writes(warp, pc, u32(address), bytes, kind, value);
  if (writes) check_against_reads(warp, pc, u32(address), bytes);
  note(warp, pc, u32(address), bytes, kind);
}

void SharedMemory::begin_copy(Warp& warp, int pc, u32 address, int bytes) {
  if (!checks_) return;
  check_in_flight(warp, pc, address, bytes, true);
  check_against_writes(warp, pc, address, bytes, Access::write, nullptr);
  check_against_reads(warp, pc, address, bytes);
  std::fill_n(copying_.begin() + address, bytes, pc + 1);
}

void SharedMemory::end_copy(Warp& warp, int pc, u32 address, int bytes) {
  if (!checks_) return;
  std::fill_n(copying_.begin() + address, bytes, 0);
  note(warp, pc, address, bytes, Access::write);
}

const u8* SharedMemory::begin_operand(Warp& warp, int pc, u64 address) {
  access(warp, pc, 0, address, kChunk, Access::read);
  if (!checks_) return at(u32(address));
  u32 chunk = u32(address) / kChunk;
  operand_uses_[chunk]++;
  operand_pc_[chunk] = pc;
  // wgmma reads through the async proxy, which need not see a plain store before a fence: by the
  // warp that stored or, which is what Triton does, by the one that reads.
  u64 fence =
      std::max(warp.last_proxy_fence, launch_.block->warps[storer_[chunk]]->last_proxy_fence);
  if (stored_[chunk] > fence)
    launch_.find(warp, {.hazard = Hazard::fence,
                        .pc = pc,
                        .other_pc = store_pc_[chunk],
                        .other_warp = storer_[chunk],
                        .other_writes = true,
                        .address = address});
  return at(u32(address));
}

void SharedMemory::end_operand(Warp& warp, u32 address) {
  if (!checks_) return;
  u32 chunk = address / kChunk;
  operand_uses_[chunk]--;
  note(warp, operand_pc_[chunk], address, kChunk, Access::read);
}

void SharedMemory::proxy_fence(Warp& warp) const { warp.last_proxy_fence = serial_; }

// ------------------------------------------------------------------ bank conflicts

namespace {

// A bank delivers one 4-byte word per pass; lanes that want the same word share it.
int passes(const u64* addresses, u32 lanes, int bytes) {
  std::array<std::vector<u64>, 32> words;
  size_t most = 0;
  for_lanes(lanes, [&](int lane) {
    for (u64 word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; word++) {
      auto& bank = words[word % 32];
      if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      most = std::max(most, bank.size());
    }
  });
  return int(most);
}

}  // namespace

void count_wavefronts(Counters& counters, const u64* addresses, u32 lanes, int bytes) {
  // 8- and 16-byte accesses are served half a warp and a quarter of a warp at a time.
  int together = bytes <= 4 ? 32 : 128 / bytes;
  u32 group = together == 32 ? kAllLanes : (1u << together) - 1;
  for (int first = 0; first < kLanes; first += together) {
    u32 served = lanes & group << first;
    if (!served) continue;
    counters.ideal_wavefronts++;
    counters.wavefronts += passes(addresses, served, bytes);
  }
}

}  // namespace ptx
