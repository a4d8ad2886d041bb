// Memory and products of the CPU kernels: tensors of any strides and dtype to tiles and back.
#pragma once

#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <vector>

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "at::parallel_for is a header: without -fopenmp it would run on one thread"
#endif

namespace eah::cpu::CPU_CAPABILITY {
namespace {

using at::BFloat16;
using at::Half;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t ROWS = 64;
constexpr int64_t KEYS = 64;
constexpr int64_t TILE = ROWS * KEYS;
constexpr int64_t CHUNKS = 4;  // of a head's row blocks in the statistics: a constant, so that sums keep their order
constexpr float INF = std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

int64_t tiles(int64_t n) {
  return (n + KEYS - 1) / KEYS;
}

float largest(const float* lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& c) { return at::vec::maximum(a, c); }, Vec::loadu(lanes));
}

float total(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& c) { return a + c; }, lanes);
}

// Aligned memory, not initialised.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : memory_(c10::GetCPUAllocator()->allocate(n * sizeof(T))) {}
  T* data() const {
    return static_cast<T*>(memory_.get());
  }

 private:
  c10::DataPtr memory_;
};

// Of work that is done in `parts` parts each, in any order.
class Countdown {
 public:
  Countdown(int64_t works, int64_t parts) : done_(works), parts_(parts) {}
  // Whether the part that was just done was the last of work `i`; then all its parts are visible to the caller.
  bool last_of(int64_t i) {
    return ++done_[i] == parts_;
  }

 private:
  std::vector<std::atomic<int64_t>> done_;
  const int64_t parts_;
};

// Calls run(item, scratch) for items 0..n-1, each once, on whichever thread is free.
template <typename MakeScratch, typename Run>
void for_each_item(int64_t n, const MakeScratch& make_scratch, const Run& run) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t item = next++; item < n; item = next++) {
      run(item, scratch);
    }
    at::native::cpublas::brgemm_release();
  });
}

// C (m, n) = A (m, k) B, or += with add. B is (k, n), for bfloat16 (k / 2, n, 2).
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, const T* b, float* c, bool add) {
  at::native::cpublas::brgemm(m, n, k, k, n, n, add, a, b, c, !std::is_same_v<T, float>);
}

template <typename T>
T* row_of(const View& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(x.data) + b * x.b + h * x.h + row * x.row;
}

// Rows first..first+rows of head h as (rows, ld), ld >= dim, zero beyond dim.
template <typename S, typename T>
void load_as(T* to, int64_t ld, const View& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim) {
  const S* from = row_of<S>(x, b, h, first);
  for (int64_t r = 0; r < rows; ++r, from += x.row, to += ld) {
    if (x.column == 1) {
      at::vec::convert(from, to, dim);
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        to[d] = static_cast<T>(from[d * x.column]);
      }
    }
    std::fill(to + dim, to + ld, T(0));
  }
}

template <typename T>
void load(T* to, int64_t ld, const View& x, Dtype dtype, int64_t b, int64_t h, int64_t first, int64_t rows,
          int64_t dim) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    load_as<BFloat16>(to, ld, x, b, h, first, rows, dim);
  } else if (dtype == Dtype::Float) {
    load_as<float>(to, ld, x, b, h, first, rows, dim);
  } else if (dtype == Dtype::BFloat16) {
    load_as<BFloat16>(to, ld, x, b, h, first, rows, dim);
  } else {
    load_as<Half>(to, ld, x, b, h, first, rows, dim);
  }
}

// Lengths of the inner dimensions as the products want them: pairs for bfloat16, whole vectors of values.
template <typename T>
int64_t padded_dim(int64_t dim) {
  return round_up(dim, 4 / sizeof(T));
}

int64_t padded_value_dim(int64_t dim) {
  return round_up(dim, 16);
}

// Key tiles of one head, each transposed: (tiles, D, 64), for bfloat16 (tiles, D / 2, 64, 2): 32-bit units either way.
template <typename T>
void pack_keys(T* packed, const Problem& p, int64_t b, int64_t h, int64_t tile, T* scratch) {
  const int64_t first = tile * KEYS, rows = std::min(KEYS, p.kv_len - first), ld = padded_dim<T>(p.dim);
  const int64_t units = ld * sizeof(T) / 4;
  load(scratch, ld, p.key, p.dtype, b, h, first, rows, p.dim);
  std::fill(scratch + rows * ld, scratch + KEYS * ld, T(0));
  at::vec::transpose_mxn<float>(
      reinterpret_cast<const float*>(scratch), units, reinterpret_cast<float*>(packed + tile * KEYS * ld), KEYS,
      static_cast<int>(KEYS), static_cast<int>(units));
}

// Value tiles of one head, (tiles, 64, Dv), for bfloat16 (tiles, 32, Dv, 2); zero where no row sees the key.
template <typename T>
void pack_values(
    T* packed, const Problem& p, const Values& values, const uint8_t* seen, int64_t b, int64_t h,
    int64_t tile, T* scratch) {
  const int64_t first = tile * KEYS, rows = std::min(KEYS, p.kv_len - first), ld = padded_value_dim(values.dim);
  packed += tile * KEYS * ld;
  T* plain = std::is_same_v<T, float> ? packed : scratch;
  load(plain, ld, values.view, p.dtype, b, h, first, rows, values.dim);
  for (int64_t r = 0; r < KEYS; ++r) {
    if (r >= rows || !seen[first + r]) {
      std::fill_n(plain + r * ld, ld, T(0));
    }
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (int64_t r = 0; r < KEYS; r += 2, packed += 2 * ld) {
      const BFloat16 *even = plain + r * ld, *odd = even + ld;
      for (int64_t d = 0; d < ld; ++d) {
        packed[2 * d] = even[d];
        packed[2 * d + 1] = odd[d];
      }
    }
  }
}

template <typename S>
void store_as(const View& output, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* from, int64_t ld,
              int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) {
    at::vec::convert(from + r * ld, row_of<S>(output, b, h, row0 + r), dim);
  }
}

void store(const View& output, Dtype dtype, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* from,
           int64_t ld, int64_t dim) {
  switch (dtype) {
    case Dtype::Float: return store_as<float>(output, b, h, row0, rows, from, ld, dim);
    case Dtype::BFloat16: return store_as<BFloat16>(output, b, h, row0, rows, from, ld, dim);
    default: return store_as<Half>(output, b, h, row0, rows, from, ld, dim);
  }
}

}  // namespace
}  // namespace eah::cpu::CPU_CAPABILITY
