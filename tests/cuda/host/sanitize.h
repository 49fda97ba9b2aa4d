// What the thread and address sanitizers have to be told about fibers and meeting points. Weak symbols: absent where
// the program is not linked with a sanitizer.
#pragma once

#include <stddef.h>

extern "C" {
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
}

namespace flowdppo::host {

// of a switch between fibers: what orders two CUDA threads is told at their meeting points
constexpr unsigned kNoSynchronisation = 1;

inline bool thread_sanitizer() { return __tsan_acquire != nullptr; }

// everything this thread did so far happens before what others do after they acquire the same event
inline void release(void* event) {
  if (__tsan_release != nullptr) __tsan_release(event);
}

inline void acquire(void* event) {
  if (__tsan_acquire != nullptr) __tsan_acquire(event);
}

// Does something in the name of another fiber of the thread sanitizer's, with what that one knows to have happened.
template <class Action>
void as_fiber(void* fiber, const Action& action) {
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber, kNoSynchronisation);
  action();
  __tsan_switch_to_fiber(self, kNoSynchronisation);
}

}  // namespace flowdppo::host
