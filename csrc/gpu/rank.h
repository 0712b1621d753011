// The columns of H = x Aᵀ.
#pragma once
#include <cstdint>

namespace rosa {

// H has a multiple of so many columns, as the tensor cores take them. Those beyond r are zeros.
constexpr int RANK_STEP = 16;

constexpr int64_t padded_rank(int64_t r) { return (r + RANK_STEP - 1) / RANK_STEP * RANK_STEP; }

}  // namespace rosa
