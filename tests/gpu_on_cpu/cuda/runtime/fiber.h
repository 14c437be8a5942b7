// A stack of its own, entered and left by hand.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();
  // Will run `entry`, which must end by `finish`. To the thread sanitizer each one is a new thread.
  void start(char* stack, std::size_t bytes, void (*entry)());
  // From the thread's own stack: runs until the next suspend or finish.
  void resume();
  void suspend() { leave(false); }
  [[noreturn]] void finish();
  // First thing in `entry`.
  void entered();

 private:
  void leave(bool for_ever);

  void *stack_pointer_, *callers_stack_pointer_;
  const void *bottom_, *callers_bottom_;
  std::size_t size_, callers_size_;
  void *fake_stack_, *callers_fake_stack_;  // of the address sanitizer
  void *tsan_fiber_ = nullptr, *callers_tsan_fiber_;
};

}  // namespace emulator
