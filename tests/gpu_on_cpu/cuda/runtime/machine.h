// Threads, warps and blocks. One block runs at a time, one thread at a time, warp by warp.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <vector>

#include "emulator/language.h"
#include "emulator/runtime.h"
#include "fiber.h"
#include "memory.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr unsigned kWholeWarp = ~0u;

// What a thread waits for: that all lanes of `mask` have come to an operation of the same name.
struct Meeting {
  const char* name;
  Site site;
  unsigned mask;
  bool aligned;  // all lanes execute the same instruction
  // Does the work for all of `mask`, given what each lane has brought.
  void (*execute)(const std::array<void*, kLanes>& brought, unsigned mask);
  void* brought;
};

struct Thread {
  enum class State { ready, in_warp, at_barrier, done };

  Fiber fiber;
  uint3 index;
  int number;  // in the block
  State state;
  const Meeting* meeting;  // in_warp
  Site barrier;            // at_barrier

  // A ring: nothing is moved within it, which would be an access for the sanitizers.
  Copy* copies;
  std::size_t oldest = 0, in_flight = 0;
  int open_group;
  std::vector<const void*> atomics;  // since the last fence
  bool fenced;                       // since the last atomic

  int lane() const { return number % kLanes; }
  int warp() const { return number / kLanes; }
};

struct Launch {
  dim3 grid, block;
  std::size_t shared_bytes;
  void (*kernel)(const void* arguments);
  const void* arguments;
  unsigned seed;  // 0: blocks, warps and lanes in their order

  int threads() const { return static_cast<int>(block.x * block.y * block.z); }
};

class Block {
 public:
  Block(const Launch& launch, uint3 index);
  void run(unsigned seed);

  const Launch& launch;
  const uint3 index;
  BlockMemory memory;
  std::vector<Thread> threads;
  // How many barriers of the block have passed, and of each warp by the lowest lane of their mask.
  // They give each barrier an address of its own, so that the thread sanitizer orders what it
  // should.
  unsigned barriers = 0;
  std::vector<std::array<unsigned, kLanes>> warp_barriers;

 private:
  bool run_warp(int warp, const std::vector<int>& lanes);
  bool hold_meetings(int warp);
  bool pass_barrier();
  [[noreturn]] void report_deadlock() const;
};

extern Block* block;     // the one that runs
extern Thread* current;  // the one that runs

void launch(const Launch& launch);

// Suspends the current thread until the lanes of the mask have met.
void meet(const Meeting& meeting);

// Ends the process; for what no single thread has done.
[[noreturn]] void fail(const char* message);

}  // namespace emulator
