// Memory of the kernels: for one call, and kept by a thread between calls.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/common/arithmetic.h"

namespace rosa {
namespace ROSA_ISA {

// memcpy and memset for any count: those want pointers that are not null, and a tensor without elements has a null one.
template <class T>
inline void copy_elements(T* to, const T* from, int64_t count) {
  if (count > 0) std::memcpy(to, from, sizeof(T) * count);
}
template <class T>
inline void clear_elements(T* to, int64_t count) {
  if (count > 0) std::memset(to, 0, sizeof(T) * count);
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
  // Cuts pieces of `counts` floats, each one aligned, out of one allocation.
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

}  // namespace ROSA_ISA
}  // namespace rosa
