// The CPU kernels' interface: what bindings.cpp hands to the build of the kernels that suits this processor.
#pragma once

#include "../common.h"

namespace eah::cpu {

// How a score is made and who sees whom: eah_kernels/masks.py, Scoring.
struct Scoring {
  View mask;  // no data: no mask
  Dtype mask_dtype = Dtype::Bool;
  int64_t mask_heads = 1;
  bool causal = true;
  float scale = 1;
  int64_t window = 0;  // 0: none
  float softcap = 0;   // 0: none
};

struct Problem {
  Dtype dtype;  // of query, key, value and output: Half, BFloat16 or Float
  int64_t batch, heads, kv_heads, q_len, kv_len, dim;
  View query, key;
  Scoring scoring;
};

struct Values {
  View view;
  int64_t dim;
};

// image (B, Skv); mean (B, Hq, Skv); lse (B, Hq, Sq) or null. Without lse a batch row without image is skipped.
using Statistics = void(const Problem&, const bool* image, float* mean, float* lse);

// head (B,); output like query, with the values' dim.
using Attend = void(const Problem&, const Values&, const int32_t* head, const View& output);

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

}  // namespace eah::cpu
