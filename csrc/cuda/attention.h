// The CUDA kernels' interface: raw pointers and a stream, no torch. bindings.cpp calls it.
#pragma once

#include "../common.h"

namespace eah::cuda {

constexpr int MAX_PREFILL = 1024;  // tokens
constexpr int MAX_BATCH = 128;

// What both kernels are given. The last dimension of query, key, value and output is contiguous, and their rows lie on
// 16-byte boundaries; D = Dv = dim. Masks are (B, S) boolean tensors.
struct Problem {
  Dtype dtype;  // Half or BFloat16, of few rows also Float
  int batch, heads, kv_heads, q_len, kv_len, dim;
  View query, key, value, output;
  View mask;  // True = real key; no data: all are
  float scale;
  float* scratch;  // as many floats as its _scratch function says
};

// Causal attention, q_len == kv_len. eah_kernels/api.py, eah_attention.
struct Prefill : Problem {
  View image;
  float threshold, min_density;
  int32_t* head;    // (B,)
  int32_t* counts;  // (B, Hq)
};

// One query row, q_len == 1, that sees every key which the mask shows: with the map of head[b], or each head's own
// where that is -1. eah_kernels/api.py, shared_map_attention.
struct FewRows : Problem {
  const int32_t* head;  // (B,)
};

int64_t prefill_scratch(int batch, int heads, int q_len);
int64_t few_rows_scratch(int batch, int heads, int kv_heads, int kv_len, int dim);

// One launch on a stream of the current device. Null, or why it was not launched.
const char* prefill(const Prefill& problem, void* stream);
const char* few_rows(const FewRows& problem, void* stream);

}  // namespace eah::cuda
