// A launch: its blocks, its memory, and what is counted on the way.
#pragma once

#include "global_memory.h"
#include "machine.h"
#include "shared_memory.h"

namespace ptx {

struct Options {
  s32 check_races, check_blocks;
  s32 seed;  // negative: warps in order, each as far as it gets
  s32 threads[3], grid[3];
  s32 shared_bytes;
  u64 max_instructions;  // per block
};

// Per instruction, over all warps and blocks; laid out by report.py.
struct Counters {
  u64 executed;                      // by a warp, whatever its guard says
  u64 requests;                      // memory: with at least one active lane
  u64 sectors, ideal_sectors;        // global memory
  u64 wavefronts, ideal_wavefronts;  // shared memory
};

struct Block {
  Launch& launch;
  s32 id[3];
  s32 number;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<int, 16> arrived{};  // threads, per barrier

  Block(Launch& launch, s32 number);
  void run();
  // Called by a warp whose lanes have all come to a barrier.
  void arrive(Warp& warp, int barrier, int expected);

 private:
  [[noreturn]] void deadlock() const;
};

struct Launch {
  const Program& program;
  const Options& options;
  const u8* parameters;
  Counters* counters;
  GlobalMemory global;
  SharedMemory shared;
  std::vector<Finding> findings;
  std::mt19937 random;
  std::unique_ptr<Block> block;  // the one that runs
  bool first_block = true;

  Launch(const Program& program, const Options& options, const u8* parameters,
         std::vector<Range> ranges, Counters* counters);
  int threads() const { return options.threads[0] * options.threads[1] * options.threads[2]; }
  void run();
  // Notes a hazard that a warp runs into, once per kind and pair of instructions.
  void find(const Warp& warp, Finding finding);
};

}  // namespace ptx
