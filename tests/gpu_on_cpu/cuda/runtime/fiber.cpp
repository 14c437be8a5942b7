#include "fiber.h"

#include <cstdlib>
#include <deque>

#include "sanitizers.h"

// Saves the registers that a callee has to keep and the stack pointer to *save; loads those of
// `load`.
extern "C" void emulator_switch_stack(void** save, void* load);
#ifndef __x86_64__
#error "emulator_switch_stack is written for x86-64 only"
#endif
asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulator {
namespace {

constexpr unsigned kNoOrder = 1;  // a switch of fibers orders nothing: only barriers do

// The thread sanitizer gives the identity of a destroyed fiber to a new one, whose accesses then do
// not race with the old one's. So the last ones live on; each that does costs a millisecond.
void retire(void* tsan_fiber) {
  constexpr std::size_t kRetired = 256;
  static std::deque<void*> retired;
  retired.push_back(tsan_fiber);
  if (retired.size() <= kRetired) return;
  __tsan_destroy_fiber(retired.front());
  retired.pop_front();
}

}  // namespace

void Fiber::start(char* stack, std::size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  bottom_ = stack;
  size_ = bytes;
  fake_stack_ = nullptr;
  auto** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // keeps the stack aligned as after a call, and ends backtraces
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
  stack_pointer_ = top;
  tsan_fiber_ = __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr;
}

Fiber::~Fiber() {
  if (tsan_fiber_) retire(tsan_fiber_);
}

void Fiber::resume() {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&callers_fake_stack_, bottom_, size_);
  if (__tsan_switch_to_fiber) {
    callers_tsan_fiber_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_fiber_, kNoOrder);
  }
  emulator_switch_stack(&callers_stack_pointer_, stack_pointer_);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(callers_fake_stack_, nullptr, nullptr);
}

void Fiber::entered() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &callers_bottom_, &callers_size_);
}

void Fiber::leave(bool for_ever) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack_, callers_bottom_,
                                   callers_size_);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(callers_tsan_fiber_, kNoOrder);
  emulator_switch_stack(&stack_pointer_, callers_stack_pointer_);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(fake_stack_, &callers_bottom_, &callers_size_);
}

void Fiber::finish() {
  leave(true);
  std::abort();  // nobody resumes it
}

}  // namespace emulator
