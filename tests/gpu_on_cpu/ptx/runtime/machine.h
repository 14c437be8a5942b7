// A SIMT machine: executes a program, assembled from PTX by assembler.py, warp by warp.
//
// A warp holds a program counter per lane. Of the lanes that can run, those with the smallest
// counter run together, so that diverged lanes meet again at the first instruction they have in
// common. Instructions are executed for all active lanes at once by a handler from the table of
// operations.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "numerics.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr u32 kAllLanes = ~0u;
constexpr int kMaxWarps = 32;
// Where generic addresses see shared memory: user space ends far below on every 64-bit system.
constexpr u64 kSharedWindow = 0x7fff'0000'0000'0000;

// ------------------------------------------------------------------ the program, laid out by
// assembler.py

struct Operand {
  s32 offset;  // into the registers of a warp
  s32 bytes;   // per lane; 0: a predicate, one bit per lane
};

struct Instruction {
  s32 operation;
  s32 guard;  // offset of the guard predicate, or -1
  s32 guard_negated;
  s32 first_operand;
  s32 destinations;  // they come first; the others are sources
  s32 operands;
  s32 immediate[4];  // what they mean is up to the operation
};

struct Program {
  const Instruction* code;
  s32 instructions;
  const Operand* operands;
  s32 register_bytes;
  const u8* initial_registers;  // constants are registers that nothing writes
  s32 special[12];              // offsets of %tid, %ntid, %ctaid, %nctaid (x, y, z each)
  s32 lane_id, warp_id;
};

// ------------------------------------------------------------------ errors and findings

// Ends the launch: there is no sensible way to go on. The machine adds where it was.
struct Fault : std::runtime_error {
  int lane;
  int pc = -1, thread = -1;
  explicit Fault(const std::string& message, int lane_ = -1)
      : std::runtime_error(message), lane(lane_) {}
  Fault& at(int pc_, int thread_) {
    pc = pc_, thread = thread_;
    return *this;
  }
};

// Mirrored by report.py.
enum class Hazard : s32 { race, copy, accumulator, operand, fence, unfinished, duplicate, blocks };

// A hazard after which execution goes on: one per kind and pair of instructions.
struct Finding {
  Hazard hazard;
  s32 pc, other_pc = -1;  // -1: there is no other instruction
  s32 warp = -1, other_warp = -1;
  s32 writes = false, other_writes = false;
  s32 block[3] = {}, other_block = -1;
  u64 address = 0;
  u64 count = 1;
};

// ------------------------------------------------------------------ execution

struct Warp;
struct Block;
struct Launch;

using Handler = void (*)(Warp&, const Instruction&, u32 lanes);

enum class Access { read, write, atomic };

enum class Flow : s32 {
  next,    // executed by the active lanes
  branch,  // immediate[0]: target
  exit,
  warp,  // waits for all lanes of a mask: immediate[0], or operand immediate[1] if that is not -1
  barrier,  // waits for warps of the block
};

struct Operation {
  std::string name;
  Handler handler;
  Flow flow;
  int operands;  // destinations and sources; -1: it looks how many there are
};

std::vector<Operation>& operations();
// wgmma: reports an instruction that touches a register of one in flight; and what is never waited
// for.
void check_in_flight(Warp& warp, const Instruction& i);
void check_finished(Warp& warp);
void add_operation(std::string name, Handler handler, Flow flow = Flow::next, int operands = -1);

// A 16-, 8- or 4-byte cp.async that has been issued and not waited for.
struct PendingCopy {
  u32 destination;
  const u8* source;
  s32 bytes, source_bytes, lane, pc;
  u32 group;
};

// wgmma operations between issue and wait: what they still read and write.
struct MmaGroup {
  std::vector<s32> accumulators, operands;  // offsets of registers
  std::vector<u32> chunks;                  // 16-byte pieces of shared memory
};

// wgmma operations in flight that write a register, and that read it.
struct RegisterUse {
  u16 written, read;
};

struct Warp {
  Launch& launch;
  Block& block;
  int index;
  u32 live, waiting = 0;  // lanes that have not exited; lanes that wait for others of this warp
  int barrier = -1;       // the barrier at which the warp waits, or -1
  std::array<u32, kLanes> pc{};
  std::vector<u8> registers;

  std::vector<PendingCopy> copies;
  std::array<u32, kLanes> copy_groups{};  // committed so far
  std::vector<MmaGroup> mma_groups{1};    // the last one is open
  std::vector<RegisterUse> in_flight;     // per register
  int registers_in_flight = 0;
  int mma_pc = -1;  // the last wgmma
  u64 last_proxy_fence = 0;

  Warp(Launch& launch, Block& block, int index);
  bool done() const { return !live; }
  bool runnable() const { return live && barrier < 0; }
  // Runs until the warp waits, has finished or has executed `turn` instructions; returns how many.
  int run(int turn);

  const Operand& operand(const Instruction& i, int k) const;
  template <class T>
  T* values(const Instruction& i, int k) {
    return reinterpret_cast<T*>(registers.data() + operand(i, k).offset);
  }
  u32& predicate(const Instruction& i, int k) { return *values<u32>(i, k); }
  // Bits of one lane of an operand of any width, zero-extended; and back, truncated.
  u64 get(const Instruction& i, int k, int lane) const;
  void set(const Instruction& i, int k, int lane, u64 bits);
  int pc_of(const Instruction& i) const;
  int thread(int lane) const { return index * kLanes + lane; }

 private:
  int run_group(u32 lanes, u32 at, u32 limit, int turn);
  u32 execute(const Instruction& i, u32 at, u32& lanes);
  void store_pc(u32 lanes, u32 value);
  u32 guarded(const Instruction& i, u32 lanes);
  u32 gather(const Instruction& i, u32 at, u32 active);
  [[noreturn]] void stuck() const;
};

inline u32 lanes_at_start(int threads, int warp) {
  int n = threads - warp * kLanes;
  return n >= kLanes ? kAllLanes : (1u << n) - 1;
}

// Calls f(lane) for each lane of a mask.
template <class F>
inline void for_lanes(u32 lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

}  // namespace ptx
