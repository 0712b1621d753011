// Buffers and loops of the kernels; everything has internal linkage or lives in its instruction set's namespace, so
// that no code compiled for a newer processor is ever picked by the linker for an older one.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/common/kernels.h"

namespace rosa {
namespace ROSA_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float as_float(float a) { return a; }
inline float as_float(uint16_t a) {  // bfloat16
  const uint32_t bits = (uint32_t)a << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Cache-line aligned memory for one call.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(static_cast<T*>(std::aligned_alloc(64, rounded_up((int64_t)sizeof(T) * count + 1, 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer(Buffer&& other) : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) {
    T* const mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// A thread's scratch memory, kept between calls: it grows to the largest layer seen.
class Arena {
 public:
  // Cuts `counts` floats, each piece aligned, out of one allocation.
  template <int N>
  void cut(const int64_t (&counts)[N], float* (&pieces)[N]) {
    int64_t total = 0;
    for (int i = 0; i < N; ++i) total += rounded_up(counts[i], 16);
    if (total > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, 4 * total));
      if (!data_) throw std::bad_alloc();
      capacity_ = total;
    }
    float* next = data_;
    for (int i = 0; i < N; ++i) {
      pieces[i] = next;
      next += rounded_up(counts[i], 16);
    }
  }
  ~Arena() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Splits [0, items) into one contiguous range a slot and runs body(slot, begin, end); the split depends on the thread
// count alone, so partial sums kept by slot and added in slot order give the same bits on every run.
template <class Body>
inline void for_slots(int64_t slots, int64_t items, const Body& body) {
  struct Context {
    const Body* body;
    int64_t slots, items;
  } context{&body, slots, items};
  auto run = [](void* opaque, int64_t slot) {
    const Context& c = *static_cast<Context*>(opaque);
    (*c.body)(slot, c.items* slot / c.slots, c.items * (slot + 1) / c.slots);
  };
  run_slots(slots, run, &context);
}

}  // namespace ROSA_ISA
}  // namespace rosa
