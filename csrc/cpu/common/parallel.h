// Work shared among PyTorch's intra-op threads. A slot is the part of it that one thread does.
#pragma once
#include "cpu/common/arithmetic.h"
#include "cpu/common/kernels.h"

namespace rosa {
namespace ROSA_ISA {

// Into how many slots so many items are split: waking a thread takes some 10 us, which only so many elements are worth.
inline int64_t slots_for(int64_t items, int64_t elements) {
  constexpr int64_t ELEMENTS_A_SLOT = 32768;
  return larger(1, smaller(smaller(thread_count(), items), elements / ELEMENTS_A_SLOT));
}

// Splits [0, items) into one contiguous range a slot and runs body(slot, begin, end). The split depends on the thread
// count alone, so that partial sums kept by slot and added in slot order give the same bits on every run.
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
