// Shared memory of a block, with a shadow that knows who touched each byte, and when.
//
// "When" is a vector clock: each warp counts the barriers it has passed and knows, of every other
// warp, the count up to which a barrier has ordered their accesses. Two accesses that no barrier
// orders, by different warps, one of them a write, are a race.
#pragma once

#include "machine.h"

namespace ptx {

struct Counters;

class SharedMemory {
 public:
  SharedMemory(Launch& launch, int bytes, bool check);

  // Uninitialised memory reads as NaN in every format.
  void begin_block();
  void synchronise(const std::vector<int>& warps);

  int size() const { return int(bytes_.size()); }
  u8* at(u32 address) { return bytes_.data() + address; }

  // Bounds, alignment and races of one access by one lane; value: what a write will write.
  void access(Warp& warp, int pc, int lane, u64 address, int bytes, Access kind,
              const u8* value = nullptr);
  // Bounds and alignment only.
  void check(u64 address, int bytes, int lane) const;

  // A cp.async that has been issued: until it lands, nobody may touch its destination.
  void begin_copy(Warp& warp, int pc, u32 address, int bytes);
  void end_copy(Warp& warp, int pc, u32 address, int bytes);

  // A 16-byte operand of a wgmma that has been issued: until it is waited for, nobody may write
  // there.
  const u8* begin_operand(Warp& warp, int pc, u64 address);
  void end_operand(Warp& warp, u32 address);
  void proxy_fence(Warp& warp) const;

 private:
  static constexpr int kChunk = 16;
  // A clock in the upper and a program counter in the lower half: ordered as the clocks are.
  using Stamp = u64;
  Stamp now(const Warp& warp, int pc) const;
  bool unordered(const Warp& warp, int other, Stamp stamp) const;
  void check_against_writes(Warp& warp, int pc, u32 address, int bytes, Access kind,
                            const u8* value);
  void check_against_reads(Warp& warp, int pc, u32 address, int bytes);
  void check_in_flight(Warp& warp, int pc, u32 address, int bytes, bool writes);
  void note(Warp& warp, int pc, u32 address, int bytes, Access kind);

  Launch& launch_;
  bool checks_;
  std::vector<u8> bytes_;
  std::array<std::array<u32, kMaxWarps>, kMaxWarps> clocks_{};

  // Per byte: the last write, and whether it was atomic; the last read of every warp; the
  // instruction of a copy in flight, plus one.
  std::vector<Stamp> written_;
  std::vector<u8> writer_, atomically_;
  std::vector<std::vector<Stamp>> read_;
  std::vector<s32> copying_;
  // Per chunk: wgmma in flight that read it, one of them, and the serial number of the last store.
  std::vector<u16> operand_uses_;
  std::vector<s32> operand_pc_;
  std::vector<u64> stored_;
  std::vector<u8> storer_;
  std::vector<s32> store_pc_;
  u64 serial_ = 0;
};

// Conflict-free and actual passes over the 32 banks of one request.
void count_wavefronts(Counters& counters, const u64* addresses, u32 lanes, int bytes);

}  // namespace ptx
