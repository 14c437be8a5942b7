// The C interface of the machine, called by kernel.py.
#include <algorithm>

#include "launch.h"

namespace ptx {

void add_collectives();
void add_conversions();
void add_floats();
void add_integers();
void add_memory();
void add_predicates();
void add_tensor_core();
void add_wgmma();

namespace {

const std::vector<Operation>& table() {
  static const bool filled = [] {
    for (auto add : {add_collectives, add_conversions, add_floats, add_integers, add_memory,
                     add_predicates, add_tensor_core, add_wgmma})
      add();
    return true;
  }();
  (void)filled;
  return operations();
}

}  // namespace

struct Result {
  s32 findings, max_findings;
  Finding* list;
  Traffic* traffic;  // per range
  s32 fault_pc, fault_thread, fault_block[3];
  char message[512];
};

extern "C" {

// Name of operation k, or null past the last one.
const char* ptx_operation(s32 k) {
  return size_t(k) < table().size() ? table()[size_t(k)].name.c_str() : nullptr;
}

// How many operands it takes, or -1.
s32 ptx_operands(s32 k) { return table()[size_t(k)].operands; }

// Returns 0, or 1 after a fault.
s32 ptx_launch(const Program* program, const Options* options, const u8* parameters,
               const Range* ranges, s32 range_count, Counters* counters, Result* result) {
  table();
  Launch launch(*program, *options, parameters, {ranges, ranges + range_count}, counters);
  s32 status = 0;
  try {
    launch.run();
  } catch (const Fault& fault) {
    status = 1;
    std::snprintf(result->message, sizeof result->message, "%s", fault.what());
    result->fault_pc = fault.pc;
    result->fault_thread = fault.thread;
    std::copy_n(launch.block->id, 3, result->fault_block);
  }
  result->findings = s32(launch.findings.size());
  std::copy_n(launch.findings.begin(), std::min(result->findings, result->max_findings),
              result->list);
  std::copy(launch.global.traffic().begin(), launch.global.traffic().end(), result->traffic);
  return status;
}
}

}  // namespace ptx
