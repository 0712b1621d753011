// Tells the sanitizers about fibers that share memory. In a build without them it does nothing.
#pragma once

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ADDRESS_SANITIZER
#endif
#if __has_feature(thread_sanitizer)
#define EMULATION_THREAD_SANITIZER
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ADDRESS_SANITIZER
#endif
#if defined(__SANITIZE_THREAD__)
#define EMULATION_THREAD_SANITIZER
#endif

#ifdef EMULATION_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef EMULATION_THREAD_SANITIZER
#define UNSEEN_BY_THREAD_SANITIZER
#else
#include <sanitizer/tsan_interface.h>
#define UNSEEN_BY_THREAD_SANITIZER __attribute__((no_sanitize("thread")))
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace cuda_emulation {

#ifdef EMULATION_THREAD_SANITIZER

// While it lives ThreadSanitizer sees no access of its fiber: for the emulation's own state.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// An order of accesses that CUDA promises: those before arrive() come before those after leave() of all that arrived
// before the hold(). To ThreadSanitizer a fiber is a thread of its own, and there is no other order between them.
struct Meeting {
  char before, after;  // two clocks: a fiber that runs ahead to its next meeting adds nothing to this one

  void arrive() { __tsan_release(&before); }
  void hold() {
    __tsan_acquire(&before);
    __tsan_release(&after);
  }
  void leave() { __tsan_acquire(&after); }
};

#else

struct Unseen {};
struct Meeting {
  void arrive() {}
  void hold() {}
  void leave() {}
};

#endif

}  // namespace cuda_emulation
