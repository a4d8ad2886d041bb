// The CUDA kernels' interface: raw pointers and a stream, no torch. bindings.cpp calls it.
#pragma once

#include "../common.h"

namespace eah::cuda {

constexpr int MAX_PREFILL = 1024;  // tokens
constexpr int MAX_BATCH = 128;

// The last dimension of query, key, value and output is contiguous, and their rows lie on 16-byte boundaries. Flags are
// (B, S) boolean tensors; no data: True everywhere.

// Causal attention of `length` rows over as many keys, D = Dv = dim. eah_kernels/api.py, eah_attention.
struct Prefill {
  Dtype dtype;  // Half or BFloat16
  int batch, heads, kv_heads, length, dim;
  View query, key, value, output;
  View image, mask;  // mask: True = real key
  float scale, threshold, min_density;
  int32_t* head;    // (B,)
  int32_t* counts;  // (B, Hq)
  float* scratch;   // prefill_scratch() floats
};

// One query row a head over `length` keys with the map of head[b], or each head's own where it is -1.
// eah_kernels/api.py, shared_map_attention.
struct Decode {
  Dtype dtype;
  int batch, heads, kv_heads, length, dim;
  View query, key, value, output;
  View mask;
  float scale;
  const int32_t* head;  // (B,)
  float* scratch;       // decode_scratch() floats
};

int64_t prefill_scratch(int batch, int heads, int length);
int64_t decode_scratch(int batch, int heads, int kv_heads, int length, int dim);

// One launch on a stream of the current device. Null, or why it was not launched.
const char* prefill(const Prefill& problem, void* stream);
const char* decode(const Decode& problem, void* stream);

}  // namespace eah::cuda
