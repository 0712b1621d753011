// Fibers: stacks that take turns on one thread.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "cuda_emulation_sanitizers.h"

extern "C" void cuda_emulation_switch(void** from, void* to);  // saves the registers that a call keeps

#if defined(__x86_64__) && defined(__linux__)
asm(R"(
.text
.weak cuda_emulation_switch
.hidden cuda_emulation_switch
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
#elif defined(__aarch64__) && defined(__linux__)
asm(R"(
.text
.weak cuda_emulation_switch
.hidden cuda_emulation_switch
.type cuda_emulation_switch, %function
cuda_emulation_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
.size cuda_emulation_switch, .-cuda_emulation_switch
)");
#else
#error "fibers are written for Linux on x86-64 and aarch64"
#endif

namespace cuda_emulation {

#if defined(EMULATION_ADDRESS_SANITIZER) || defined(EMULATION_THREAD_SANITIZER)
constexpr size_t STACK_SIZE = 256 << 10;
#else
constexpr size_t STACK_SIZE = 64 << 10;
#endif
constexpr size_t STACK_STEP = STACK_SIZE + 320;  // tops a power of two apart would share their cache sets
constexpr uint64_t END_OF_STACK = 0x0123456789abcdef;

// A stack, and where it was left. A default one stands for the operating system's thread.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* to_thread_sanitizer = nullptr;
};

inline Fiber* last_left = nullptr;

// A fiber calls this first when it was switched to.
inline void arrived([[maybe_unused]] void* fake_stack = nullptr) {
#ifdef EMULATION_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, &last_left->stack, &last_left->stack_size);
#endif
}

UNSEEN_BY_THREAD_SANITIZER inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good = false) {
  void* fake_stack = nullptr;
#ifdef EMULATION_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, to.stack, to.stack_size);
#endif
#ifdef EMULATION_THREAD_SANITIZER
  from.to_thread_sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.to_thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  last_left = &from;
  cuda_emulation_switch(&from.stack_pointer, to.stack_pointer);
  arrived(fake_stack);
}

constexpr size_t MOST_FIBERS = 1024;

#ifdef EMULATION_THREAD_SANITIZER
inline void* known_to_thread_sanitizer[MOST_FIBERS];  // made once: that takes long
#endif

// Call this when fibers were left in the middle: their records are of no use afterwards.
inline void forget_abandoned() {
#ifdef EMULATION_THREAD_SANITIZER
  std::fill_n(known_to_thread_sanitizer, MOST_FIBERS, nullptr);
#endif
}

// Makes the at-th fiber begin at `entry`, which never returns, when it is first switched to.
inline void start(Fiber& fiber, size_t at, void (*entry)()) {
  static unsigned char* const stacks = static_cast<unsigned char*>(std::aligned_alloc(64, STACK_STEP * MOST_FIBERS));
  unsigned char* const stack = stacks + STACK_STEP * at;
#ifdef EMULATION_THREAD_SANITIZER
  void*& known = known_to_thread_sanitizer[at];
  if (!known) known = __tsan_create_fiber(0);
  fiber.to_thread_sanitizer = known;
#endif
#ifdef EMULATION_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(stack, STACK_SIZE);  // an abandoned fiber left its frames' red zones
#endif
  fiber.stack = stack;
  fiber.stack_size = STACK_SIZE;
  *reinterpret_cast<uint64_t*>(stack) = END_OF_STACK;
#if defined(__x86_64__)
  constexpr int WORDS = 8, RETURN = 6;  // six registers, the address to return to, no address to return to from there
#else
  constexpr int WORDS = 20, RETURN = 1;  // x30 among the registers
#endif
  void** frame = reinterpret_cast<void**>(stack + STACK_SIZE) - WORDS;
  std::fill_n(frame, WORDS, nullptr);
  frame[RETURN] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = frame;
}

inline bool overflowed(const Fiber& fiber) { return *static_cast<const uint64_t*>(fiber.stack) != END_OF_STACK; }

}  // namespace cuda_emulation
