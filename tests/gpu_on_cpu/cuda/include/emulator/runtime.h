// What the headers call in the runtime, which no sanitizer instruments: only kernels are watched.
#pragma once

#include <stddef.h>

namespace emulator {

// Where a kernel calls; as a default argument it is the caller's line.
struct Site {
  const char* file = __builtin_FILE();
  int line = __builtin_LINE();
};

template <class T>
struct Same {  // keeps an argument's type out of the deduction
  using type = T;
};

// Ends the process; the message says which thread of which block was running.
[[noreturn, gnu::format(printf, 2, 3)]] void fault(Site site, const char* format, ...);

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);
int lane();
// The bits that lane `source` brings.
unsigned shuffle(unsigned mask, unsigned bits, int source, const char* name, Site site);
unsigned ballot(unsigned mask, bool predicate, const char* name, Site site);

// Order of memory between blocks, told to the thread sanitizer.
void fence();
void before_atomic(const void* address);
void after_atomic(const void* address);
void release(const void* address);
void acquire(const void* address);

void* dynamic_shared();

// An asynchronous copy, in flight from its issue until the wait for its group.
struct Copy {
  void* shared;
  const void* global;
  int bytes, source_bytes, group;
};
void check_copy(const Copy& copy, Site site);
void issue(const Copy& copy);  // from here on nobody may touch its destination
void commit_copies();
// The next copy that has to land so that only the newest `groups` groups stay in flight.
bool land_copy(int groups, Copy* copy);

struct Row {  // of a matrix in shared memory
  unsigned words[4];
};
void check_row(const void* row, Site site);
void load_matrices(unsigned* registers, int matrices, bool transposed, const Row& row, Site site);

enum class Format { bf16, f16, tf32 };
// d += a b, 16 x 8. d: 4 registers, a: 4, b: 2.
void multiply(Format format, float* d, const unsigned* a, const unsigned* b, Site site);

unsigned short bf16_bits(float x);
unsigned short f16_bits(float x);
float f16_value(unsigned short bits);
unsigned tf32_bits(float x);
float flush_subnormal(float x);

}  // namespace emulator
