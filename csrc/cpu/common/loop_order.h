// What ThreadSanitizer must be told about a parallel loop. PyTorch's threads are not compiled with it, so it does not
// see that every slot comes after what the caller did before the loop, and before what the caller does next. Two slots
// of one loop have no order, and a race between them is reported. In other builds nothing here does anything.
#pragma once

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define ROSA_THREAD_SANITIZER
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define ROSA_THREAD_SANITIZER
#endif

#ifdef ROSA_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

namespace rosa {

struct LoopOrder {
#ifdef ROSA_THREAD_SANITIZER
  static inline char begun, ended;  // clocks, outside any thread's stack: reading that would be the first race
  static void before_loop() { __tsan_release(&begun); }
  static void before_slots() { __tsan_acquire(&begun); }
  static void after_slots() { __tsan_release(&ended); }
  static void after_loop() { __tsan_acquire(&ended); }
#else
  static void before_loop() {}
  static void before_slots() {}
  static void after_slots() {}
  static void after_loop() {}
#endif
};

}  // namespace rosa
