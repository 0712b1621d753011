// A grid of CUDA threads, block by block: who waits for whom, and who runs next.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_emulation_fibers.h"

#if defined(__linux__) && !defined(EMULATION_ADDRESS_SANITIZER) && !defined(EMULATION_THREAD_SANITIZER)
#define EMULATION_FILLS_STATIC_SHARED  // __shared__ arrays are thread_local: static_shared() finds those
#include <link.h>
#endif

namespace cuda_emulation {

struct Index {
  unsigned x, y, z;
};

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct Block;
struct Thread;

// What lanes of a warp do together. The last lane to arrive does it for all that take part.
using Collective = void (*)(Thread* lanes, unsigned mask);

enum class State { ready, at_barrier, at_collective, done };

struct Warp {
  Thread* lanes;
  unsigned ready, waiting,
      absent;  // A bit for each lane. waiting: at a collective; absent: exited or beyond the block.
  Meeting meeting;
};

struct Thread {
  Block* block;
  Warp* warp;
  Index index;
  unsigned lane;
  State state;
  // Where it waits, and the operands of a collective.
  const char* operation;
  Site site;
  Collective serve;
  unsigned mask;
  uint64_t value;
  unsigned source;
  float* acc;
  const uint32_t *a, *b;
  Fiber fiber;
};

struct Block {
  Index index, size, grid;
  const std::function<void()>* kernel;
  unsigned char* shared;  // dynamic
  size_t shared_size;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  size_t done;
  Meeting meeting;
};

inline thread_local Thread* current = nullptr;

inline Fiber outside;  // who called the launch
inline bool backwards = false;
inline std::string failure;

// Ends the launch, which throws.
[[noreturn]] inline void fail(const std::string& why) {
  failure = why;
  switch_fiber(current->fiber, outside, true);
  std::abort();
}

inline unsigned bit_of(const Thread& t) { return 1u << t.lane; }

inline std::string where(const Thread& t) {
  if (t.state == State::done) return "exited";
  return std::string(t.operation) + " at " + t.site.file + ":" + std::to_string(t.site.line);
}

// "threads 0 to 31 exited; threads 32 to 63 wait in ..."
inline std::string standstill(const Block& block) {
  std::string text;
  for (size_t first = 0, i = 1; i <= block.threads.size(); ++i) {
    const std::string place = where(block.threads[first]);
    if (i < block.threads.size() && where(block.threads[i]) == place) continue;
    text += (first ? "; threads " : "threads ") + std::to_string(first) + " to " + std::to_string(i - 1) + ": " + place;
    first = i;
  }
  return text;
}

inline void run_on(Thread& t) {
  t.state = State::ready;
  t.warp->ready |= bit_of(t);
}

// Ends the wait at a collective whose lanes have all arrived; others of the mask that have exited are not waited for.
inline void complete(const Thread& t) {
  Warp& warp = *t.warp;
  if (t.mask & ~(warp.waiting | warp.absent)) return;
  const unsigned mask = t.mask & ~warp.absent;
  for (unsigned left = mask; left; left &= left - 1) {
    const Thread& other = warp.lanes[__builtin_ctz(left)];
    if (other.serve != t.serve || other.mask != t.mask || !(other.site == t.site)) return;
  }
  t.serve(warp.lanes, mask);
  warp.waiting &= ~mask;
  for (unsigned left = mask; left; left &= left - 1) run_on(warp.lanes[__builtin_ctz(left)]);
}

// Runs when no thread is ready. Then all that are left wait at one barrier, which ends, or they would wait for ever.
inline void end_barrier(Block& block) {
  const Thread* first = nullptr;
  for (const Thread& t : block.threads) {
    if (t.state == State::done) continue;
    if (!first) first = &t;
    if (t.state != State::at_barrier || !(t.site == first->site))
      fail("divergent barrier or incomplete *_sync: " + standstill(block));
  }
  block.meeting.hold();
  for (Thread& t : block.threads)
    if (t.state == State::at_barrier) run_on(t);
}

inline void finish(Thread& t) {
  t.state = State::done;
  t.warp->absent |= bit_of(t);
  ++t.block->done;
  unsigned& waiting = t.warp->waiting;
  for (unsigned tried = 0; waiting & ~tried;) {
    const int lane = __builtin_ctz(waiting & ~tried);
    tried |= 1u << lane;
    complete(t.warp->lanes[lane]);
  }
}

// The thread to run next: one of the same warp where any is ready, since its lanes wait for each other. Null where no
// thread of the block is ready.
inline Thread* next_ready(Block& block, Warp* warp) {
  if (!warp->ready) {
    const auto is_ready = [](const Warp& w) { return w.ready != 0; };
    if (backwards) {
      const auto found = std::find_if(block.warps.rbegin(), block.warps.rend(), is_ready);
      if (found == block.warps.rend()) return nullptr;
      warp = &*found;
    } else {
      const auto found = std::find_if(block.warps.begin(), block.warps.end(), is_ready);
      if (found == block.warps.end()) return nullptr;
      warp = &*found;
    }
  }
  const int lane = backwards ? 31 - __builtin_clz(warp->ready) : __builtin_ctz(warp->ready);
  warp->ready &= ~(1u << lane);
  return &warp->lanes[lane];
}

inline Thread* next_after(Thread& t) {
  Thread* next = next_ready(*t.block, t.warp);
  if (next || t.block->done == t.block->threads.size()) return next;
  end_barrier(*t.block);
  return next_ready(*t.block, t.warp);
}

inline void wait(Thread& t) {
  Thread* next = next_after(t);
  current = next;
  if (next != &t) switch_fiber(t.fiber, next->fiber);
}

// Collectives

inline void meet(Thread* lanes, unsigned) { lanes->warp->meeting.hold(); }

inline void exchange(Thread* lanes, unsigned mask) {
  uint64_t values[32];
  for (unsigned left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const unsigned source = lanes[lane].source;
    if (source >= 32 || !(mask >> source & 1))
      fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
           ", which takes no part: " + where(lanes[lane]));
    values[lane] = lanes[source].value;
  }
  for (unsigned left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    lanes[lane].value = values[lane];
  }
}

inline void count_votes(Thread* lanes, unsigned mask) {
  unsigned votes = 0;
  for (unsigned left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    votes |= static_cast<unsigned>(lanes[lane].value) << lane;
  }
  for (unsigned left = mask; left; left &= left - 1) lanes[__builtin_ctz(left)].value = votes;
}

// Sets all threads to the start of the at-th block of the grid.
inline void prepare(Block& block, uint64_t at) {
  const uint64_t x = block.grid.x, y = block.grid.y;
  block.index = {static_cast<unsigned>(at % x), static_cast<unsigned>(at / x % y), static_cast<unsigned>(at / x / y)};
  std::memset(block.shared, 0xff, block.shared_size);  // NaN, and -1
  block.done = 0;
  const size_t count = block.threads.size();
  for (size_t i = 0; i < block.warps.size(); ++i) {
    const unsigned lanes = count - 32 * i >= 32 ? 0xffffffffu : (1u << (count - 32 * i)) - 1;
    block.warps[i] = {&block.threads[32 * i], lanes, 0, ~lanes, {}};
  }
  for (Thread& t : block.threads) t.state = State::ready;
}

inline void barrier(Site here) {
  Thread& t = *current;
  t.block->meeting.arrive();
  {
    [[maybe_unused]] const Unseen unseen;
    t.operation = "__syncthreads";
    t.site = here;
    t.state = State::at_barrier;
    wait(t);
  }
  t.block->meeting.leave();
}

inline void collective(const char* operation, Collective serve, unsigned mask, Site here) {
  Thread& t = *current;
  t.warp->meeting.arrive();
  {
    [[maybe_unused]] const Unseen unseen;
    t.operation = operation;
    t.site = here;
    t.serve = serve;
    t.mask = mask;
    t.state = State::at_collective;
    if (!(mask & bit_of(t))) fail("a lane is not in its own mask: " + where(t));
    t.warp->waiting |= bit_of(t);
    complete(t);
    wait(t);
  }
  t.warp->meeting.leave();
}

// Every fiber begins here.
inline void run_thread() {
  arrived();
  Thread* self;
  Meeting* meeting;
  Fiber* next;
  {
    [[maybe_unused]] const Unseen unseen;
    self = current;
    meeting = &self->block->meeting;
  }
  meeting->leave();
  (*self->block->kernel)();
  meeting->arrive();
  {
    [[maybe_unused]] const Unseen unseen;
    finish(*self);
    current = next_after(*self);
    next = current ? &current->fiber : &outside;
  }
  switch_fiber(self->fiber, *next, true);
  std::abort();
}

#ifdef EMULATION_FILLS_STATIC_SHARED
struct Range {
  unsigned char* begin;
  size_t size;
};

// This library's thread_local memory in this thread: the static shared arrays of all kernels, and `current`.
inline Range static_shared() {
  Range found{reinterpret_cast<unsigned char*>(&current), 0};
  const auto look = [](dl_phdr_info* library, size_t, void* result) {
    Range& range = *static_cast<Range*>(result);
    auto* begin = static_cast<unsigned char*>(library->dlpi_tls_data);
    for (int i = 0; begin && i < library->dlpi_phnum; ++i) {
      const auto& header = library->dlpi_phdr[i];
      if (header.p_type != PT_TLS || range.begin < begin || range.begin >= begin + header.p_memsz) continue;
      range = {begin, header.p_memsz};
      return 1;
    }
    return 0;
  };
  if (!dl_iterate_phdr(look, &found)) throw std::runtime_error("no thread-local memory is found to fill");
  return found;
}
#endif

inline void run_block(Block& block) {
  block.meeting.arrive();
  block.meeting.hold();
  for (size_t i = 0; i < block.threads.size(); ++i) start(block.threads[i].fiber, i, run_thread);
  current = next_ready(block, backwards ? &block.warps.back() : &block.warps.front());
  switch_fiber(outside, current->fiber);
  block.meeting.hold();
  block.meeting.leave();
  for (const Thread& t : block.threads)
    if (overflowed(t.fiber)) failure = "a stack of " + std::to_string(STACK_SIZE) + " bytes is too small";
  if (failure.empty()) return;
  forget_abandoned();
  throw std::runtime_error(std::exchange(failure, ""));
}

// All of a grid's blocks; under ROSA_EMULATION_BLOCKS=last only the one that is the last along each axis, so that tests
// reach the end of a grid of billions.
inline std::vector<uint64_t> blocks_to_run(const Index& grid) {
  const uint64_t count = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const char* wanted = std::getenv("ROSA_EMULATION_BLOCKS");
  if (wanted && std::strcmp(wanted, "last") == 0) return {count - 1};
  std::vector<uint64_t> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (backwards) std::reverse(blocks.begin(), blocks.end());
  return blocks;
}

inline void run_blocks(Block& block) {
  const char* order = std::getenv("ROSA_EMULATION_ORDER");
  backwards = order && std::strcmp(order, "reversed") == 0;
#ifdef EMULATION_FILLS_STATIC_SHARED
  const Range arrays = static_shared();
#endif
  for (const uint64_t i : blocks_to_run(block.grid)) {
#ifdef EMULATION_FILLS_STATIC_SHARED
    Thread* const kept = current;
    std::memset(arrays.begin, 0xff, arrays.size);
    current = kept;
#endif
    prepare(block, i);
    run_block(block);
  }
}

inline void run_grid(Index grid, Index size, size_t shared_size, const std::function<void()>& kernel) {
  static std::mutex launches;
  const std::lock_guard<std::mutex> one_at_a_time(launches);
  [[maybe_unused]] const Unseen unseen;
  const size_t count = static_cast<size_t>(size.x) * size.y * size.z;
  Block block{
      {}, size, grid, &kernel, nullptr, shared_size, std::vector<Warp>((count + 31) / 32), std::vector<Thread>(count),
      0,  {}};
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_size]);  // its own end, for AddressSanitizer
  block.shared = shared.get();
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.warp = &block.warps[i / 32];
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.lane = i % 32;
  }
  run_blocks(block);
}

}  // namespace cuda_emulation
