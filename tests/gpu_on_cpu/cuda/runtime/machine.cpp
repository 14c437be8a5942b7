#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include "cuda_harness.h"
#include "sanitizers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Block* block;
Thread* current;

namespace {

// Most that a block may have: of an H100, and 163 KB of an A100.
constexpr std::size_t kMaxSharedBytes = 227 << 10;
constexpr int kFaultStatus = 70;  // as of sysexits.h; sanitizers end with 1 and 66
constexpr std::size_t kMaxAtomics = 64;

const char launch_begins = 0, launch_ends = 0;  // for the thread sanitizer

void run_thread() {
  current->fiber.entered();
  acquire(&launch_begins);
  block->launch.kernel(block->launch.arguments);
  release(&launch_ends);
  if (current->in_flight)
    fault(current->barrier, "a thread ends with asynchronous copies in flight; its last barrier");
  current->state = Thread::State::done;
  current->fiber.finish();
}

bool same(Site a, Site b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

bool may_meet(const Meeting& a, const Meeting& b) {
  return a.mask == b.mask && !std::strcmp(a.name, b.name) && (!a.aligned || same(a.site, b.site));
}

void print_index(const char* what, uint3 index) {
  std::fprintf(stderr, "%s (%u, %u, %u)", what, index.x, index.y, index.z);
}

[[noreturn]] void end_process() {
  std::fflush(stderr);
  std::_Exit(kFaultStatus);  // without what sanitizers say of an ordinary end
}

}  // namespace

void fault(Site site, const char* format, ...) {
  std::fprintf(stderr, "%s:%d: emulator: ", site.file, site.line);
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  print_index("; thread", current->index);
  print_index(" of block", block->index);
  std::fprintf(stderr, "\n");
  if (__sanitizer_print_stack_trace) __sanitizer_print_stack_trace();
  end_process();
}

void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  end_process();
}

void release(const void* address) {
  if (__tsan_release) __tsan_release(address);
}
void acquire(const void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

Block::Block(const Launch& launch, uint3 index)
    : launch(launch),
      index(index),
      memory(launch.shared_bytes, launch.threads()),
      threads(launch.threads()),
      warp_barriers((launch.threads() + kLanes - 1) / kLanes) {
  for (int i = 0; i < launch.threads(); i++) {
    Thread& thread = threads[i];
    const auto n = static_cast<unsigned>(i);
    thread.index = {n % launch.block.x, n / launch.block.x % launch.block.y,
                    n / (launch.block.x * launch.block.y)};
    thread.number = i;
    thread.state = Thread::State::ready;
    thread.copies = memory.copies(i);
    // Threads must not allocate: others would free it, unordered in the thread sanitizer's eyes.
    thread.atomics.reserve(kMaxAtomics);
    thread.fiber.start(memory.stack(i), BlockMemory::kStackBytes, run_thread);
  }
}

void Block::run(unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int> warps(warp_barriers.size()), lanes(kLanes);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  const auto is_done = [](const Thread& t) { return t.state == Thread::State::done; };
  while (!std::all_of(threads.begin(), threads.end(), is_done)) {
    if (seed) {
      std::shuffle(warps.begin(), warps.end(), random);
      std::shuffle(lanes.begin(), lanes.end(), random);
    }
    bool progress = false;
    for (int warp : warps)  // each as far as it gets alone, so that missing barriers show
      while (run_warp(warp, lanes)) progress = true;
    progress |= pass_barrier();
    if (!progress) report_deadlock();
  }
}

// Whether any of its lanes has done something.
bool Block::run_warp(int warp, const std::vector<int>& lanes) {
  bool progress = false;
  for (int lane : lanes) {
    const auto number = static_cast<std::size_t>(warp * kLanes + lane);
    if (number >= threads.size() || threads[number].state != Thread::State::ready) continue;
    current = &threads[number];
    threadIdx = current->index;
    current->fiber.resume();
    progress = true;
  }
  return hold_meetings(warp) || progress;
}

bool Block::hold_meetings(int warp) {
  bool progress = false;
  const int first = warp * kLanes;
  const int lanes = std::min(kLanes, static_cast<int>(threads.size()) - first);
  for (int i = 0; i < lanes; i++) {
    if (threads[first + i].state != Thread::State::in_warp) continue;
    const Meeting& meeting = *threads[first + i].meeting;
    unsigned met = 0;
    std::array<void*, kLanes> brought{};
    for (int j = 0; j < lanes; j++) {
      const Thread& other = threads[first + j];
      if (other.state != Thread::State::in_warp || !may_meet(meeting, *other.meeting)) continue;
      met |= 1u << j;
      brought[j] = other.meeting->brought;
    }
    if (met != meeting.mask) continue;
    if (meeting.execute) meeting.execute(brought, meeting.mask);
    for (int j = 0; j < lanes; j++)
      if (met >> j & 1) threads[first + j].state = Thread::State::ready;
    progress = true;
  }
  return progress;
}

// When all that have not ended have come to it.
bool Block::pass_barrier() {
  const Thread* first = nullptr;
  for (Thread& thread : threads) {
    if (thread.state == Thread::State::done) continue;
    if (thread.state != Thread::State::at_barrier) return false;
    if (!first) first = &thread;
    if (!same(first->barrier, thread.barrier)) {
      current = &thread;
      fault(thread.barrier, "__syncthreads diverges: thread %d waits in another, %s:%d",
            first->number, first->barrier.file, first->barrier.line);
    }
  }
  if (!first) return false;
  for (Thread& thread : threads)
    if (thread.state == Thread::State::at_barrier) thread.state = Thread::State::ready;
  barriers++;
  return true;
}

void Block::report_deadlock() const {
  const auto description = [](const Thread& thread) -> std::string {
    char text[512] = "have ended";
    if (thread.state == Thread::State::at_barrier)
      std::snprintf(text, sizeof text, "wait at %s:%d: __syncthreads", thread.barrier.file,
                    thread.barrier.line);
    if (thread.state == Thread::State::in_warp)
      std::snprintf(text, sizeof text, "wait at %s:%d: %s of lanes %08x", thread.meeting->site.file,
                    thread.meeting->site.line, thread.meeting->name, thread.meeting->mask);
    return text;
  };
  print_index("emulator: deadlock in block", index);
  for (std::size_t begin = 0, end; begin < threads.size(); begin = end) {
    const std::string what = description(threads[begin]);
    for (end = begin + 1; end < threads.size() && description(threads[end]) == what;) end++;
    std::fprintf(stderr, "%s threads %zu to %zu %s", begin ? ";" : ":", begin, end - 1,
                 what.c_str());
  }
  std::fprintf(stderr, "\n");
  end_process();
}

void meet(const Meeting& meeting) {
  if (!(meeting.mask >> current->lane() & 1))
    fault(meeting.site, "%s: the mask %08x lacks lane %d, which calls it", meeting.name,
          meeting.mask, current->lane());
  current->meeting = &meeting;
  current->state = Thread::State::in_warp;
  current->fiber.suspend();
}

void block_barrier(Site site) {
  const void* address = block->memory.barrier_address(-1, 0, block->barriers);
  release(address);
  current->barrier = site;
  current->state = Thread::State::at_barrier;
  current->fiber.suspend();
  acquire(address);
}

void* dynamic_shared() { return block->memory.shared(); }

void launch(const Launch& launch) {
  const dim3 grid = launch.grid, threads = launch.block;
  if (launch.threads() < 1 || launch.threads() > kMaxThreads || threads.z > 64)
    fail("no GPU launches a block of that many threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x >> 31 || grid.y >> 16 || grid.z >> 16)
    fail("no GPU launches a grid of that size");
  if (launch.shared_bytes > kMaxSharedBytes) fail("no GPU has that much shared memory");
  std::vector<uint3> indices;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) indices.push_back({x, y, z});
  if (launch.seed) std::shuffle(indices.begin(), indices.end(), std::mt19937(launch.seed));
  gridDim = grid;
  blockDim = threads;
  release(&launch_begins);
  for (uint3 index : indices)
    std::thread([&] {  // for its thread-local variables: they are static shared memory
      blockIdx = index;
      Block running(launch, index);
      block = &running;
      running.run(launch.seed);
    })
        .join();
  acquire(&launch_ends);
}

void launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(const void*),
            const void* arguments) {
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  const auto seed = static_cast<unsigned>(order ? std::atoi(order) : 0);
  launch({grid, block, shared_bytes, kernel, arguments, seed});
}

}  // namespace emulator
