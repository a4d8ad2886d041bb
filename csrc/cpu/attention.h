// The CPU kernels' interface: what bindings.cpp hands to the build of attention.cpp that suits this processor.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace eah {

// A (B, H, S, D) tensor. Strides are in elements; a mask's stride is 0 along what it does not depend on.
struct Operand {
  const void* data = nullptr;
  c10::ScalarType dtype = c10::ScalarType::Float;
  int64_t strides[4] = {0, 0, 0, 0};
};

// How a score is made and who sees whom: eah_kernels/masks.py, Scoring.
struct Scoring {
  Operand mask;  // no data: no mask
  int64_t mask_heads = 1;
  bool causal = true;
  float scale = 1;
  int64_t window = 0;  // 0: none
  float softcap = 0;   // 0: none
};

struct Problem {
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
  Operand query, key;
  Scoring scoring;
};

// image (B, Skv); mean (B, Hq, Skv); lse (B, Hq, Sq) or null. Without lse a batch row without image is skipped.
using Statistics = void(const Problem&, const bool* image, float* mean, float* lse);

// head (B,); output like query, with value_dim for dim.
using Attend =
    void(const Problem&, const Operand& value, int64_t value_dim, const int32_t* head, const Operand& output);

namespace DEFAULT {
Statistics statistics;
Attend attend;
}  // namespace DEFAULT
namespace AVX2 {
Statistics statistics;
Attend attend;
}  // namespace AVX2
namespace AVX512 {
Statistics statistics;
Attend attend;
}  // namespace AVX512

}  // namespace eah
