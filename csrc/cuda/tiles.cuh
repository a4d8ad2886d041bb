// What the kernels share: who is who in a block, tiles in shared memory, which work a block takes.
#pragma once

#include "attention.h"

#include "ptx.cuh"

namespace eah::cuda {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr unsigned EVERY_LANE = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;

__device__ float infinity() {
  return __int_as_float(0x7f800000);
}

template <typename T>
__device__ T* row_of(const View& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(x.data) + b * x.b + h * x.h + row * x.row;
}

__device__ bool flag(const View& flags, int64_t b, int64_t j) {
  return flags.data == nullptr || static_cast<const bool*>(flags.data)[b * flags.b + j * flags.column];
}

// The pieces of work of a batch: a row with a chosen head (heads[b] >= 0) has `shared` of them, another one `own`.
struct Work {
  const int* heads;
  int batch, shared, own;

  __device__ int count(int b) const {
    return heads[b] >= 0 ? shared : own;
  }
  __device__ int total() const {
    int sum = 0;
    for (int b = 0; b < batch; ++b) {
      sum += count(b);
    }
    return sum;
  }
  // From `index` over the whole batch to the row b and the index within it.
  __device__ int row(int& index) const {
    int b = 0;
    for (; index >= count(b); ++b) {
      index -= count(b);
    }
    return b;
  }
};

// A running maximum and sum of exponentials to base 2. An empty one is {-inf, 0}.
struct LogSum {
  float max, sum;

  // What exponents are taken relative to: finite also where nothing has been seen.
  __device__ float base() const {
    return max == -infinity() ? 0.f : max;
  }
  __device__ void merge(const LogSum& other) {
    const LogSum mine = *this;
    max = fmaxf(mine.max, other.max);
    sum = mine.sum * exp2_approximate(mine.max - base()) + other.sum * exp2_approximate(other.max - base());
  }
};

}  // namespace
}  // namespace eah::cuda
