// The numbers that the kernels share with whoever makes room for what they write and divides their sums among blocks:
// kernel_calls.cpp, and tests/support/cuda_kernels.py, which has each of them under the same name.
// tests/cuda/test_constants.py reads both sides, so that every constant here is one line: constexpr int NAME = number;
#pragma once
#include "gpu/rank.h"

namespace rosa {

// Tokens, features and entries of S are counted in int32, and the end of the last tile must not wrap: 2^31 - 2^20.
constexpr int MOST_LENGTH = 2146435072;

// xᵀ has a multiple of so many tokens in each row. Those beyond T are zeros.
constexpr int TOKEN_PADDING = 64;

// The epilogue prefetches. It may read up to ENTRY_PADDING packed entries beyond the last one.
constexpr int ENTRY_PADDING = 32;
constexpr int PACKED_ENTRY_BYTES = 8;

// More static shared memory than any block of the epilogue declares.
constexpr int STATIC_SHARED_BYTES = 1024;

// So many bf16 numbers hold the 24 bits of an fp32 number.
constexpr int SPLIT_TERMS = 3;

// What one block computes, and how much of the split axis it takes at a time. A block of shrink takes fewer ranks where
// each number of an fp32 A is a sum of three bf16 terms, and fewer still without tensor cores.
constexpr int SHRINK_TOKENS = 16;
constexpr int SHRINK_RANKS = 64;
constexpr int SHRINK_RANKS_IN_TERMS = 32;
constexpr int SHRINK_RANKS_BY_LANES = 16;
constexpr int SHRINK_STEP_BYTES = 512;
constexpr int LORA_GRAD_FEATURES = 64;
constexpr int LORA_GRAD_RANKS = 32;
constexpr int LORA_GRAD_STEP_TOKENS = 128;
constexpr int SDDMM_BLOCK_ENTRIES = 64;
constexpr int EPILOGUE_TOKENS = 16;

}  // namespace rosa
