// The CUDA kernels' interface: raw pointers and a stream, no torch. bindings_cuda.cpp calls it.
#pragma once

#include <cstdint>

namespace eah::cuda {

enum class Dtype { Half, BFloat16, Float };

// A (B, H, S, D) tensor whose last dimension is contiguous and whose rows lie on 16-byte boundaries; strides in
// elements.
struct Operand {
  void* data;
  int64_t strides[3];
};

// A (B, S) boolean tensor, strides in bytes; no data: True everywhere.
struct Flags {
  const bool* data;
  int64_t strides[2];
};

constexpr int MAX_PREFILL = 1024;  // tokens
constexpr int MAX_BATCH = 128;

// Causal attention of `length` rows over as many keys, D = Dv = dim. eah_kernels/api.py, eah_attention.
struct Prefill {
  Dtype dtype;  // Half or BFloat16
  int batch, heads, kv_heads, length, dim;
  Operand query, key, value, output;
  Flags image, mask;  // mask: True = real key
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
  Operand query, key, value, output;
  Flags mask;
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
