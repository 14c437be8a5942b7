// The sanitizers' interface. One runtime serves all builds: what a build lacks is null.
#pragma once

#include <cstddef>

extern "C" {
#define EMULATOR_WEAK __attribute__((weak))
EMULATOR_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                  std::size_t size);
EMULATOR_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom,
                                                   std::size_t* old_size);
EMULATOR_WEAK void __sanitizer_print_stack_trace();
EMULATOR_WEAK void __asan_poison_memory_region(const void* address, std::size_t size);
EMULATOR_WEAK void __asan_unpoison_memory_region(const void* address, std::size_t size);
EMULATOR_WEAK void* __tsan_get_current_fiber();
EMULATOR_WEAK void* __tsan_create_fiber(unsigned flags);
EMULATOR_WEAK void __tsan_destroy_fiber(void* fiber);
EMULATOR_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
EMULATOR_WEAK void __tsan_acquire(const void* address);
EMULATOR_WEAK void __tsan_release(const void* address);
#undef EMULATOR_WEAK
}

namespace emulator {

inline void poison(const void* address, std::size_t size) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(address, size);
}
inline void unpoison(const void* address, std::size_t size) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(address, size);
}

}  // namespace emulator
