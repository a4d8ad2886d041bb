// Products of a few rows with 64 keys or values where they lie, in float32.
#pragma once

#include "tiles.h"

#include <ATen/cpu/vec/functional_bfloat16.h>

namespace eah::cpu::CPU_CAPABILITY {
namespace {

int64_t whole_vectors(int64_t dim) {
  return round_up(dim, Vec::size());
}

Vec widened(const float* from) {
  return Vec::loadu(from);
}

template <typename S>
Vec widened(const S* from) {
  Vec x;
  at::vec::load_to_float(from, x);
  return x;
}

// Calls run(rows, stride) on rows first.. of head h: as they lie where their features are whole vectors side by side,
// otherwise on a copy in float32 with zeros up to whole vectors.
template <typename Run>
void with_rows(const Problem& p, const View& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim,
               float* copy, const Run& run) {
  const int64_t ld = whole_vectors(dim);
  if (x.column != 1 || ld != dim) {
    load(copy, ld, x, p.dtype, b, h, first, rows, dim);
    return run(static_cast<const float*>(copy), ld);
  }
  switch (p.dtype) {
    case Dtype::Float: return run(row_of<const float>(x, b, h, first), x.row);
    case Dtype::BFloat16: return run(row_of<const BFloat16>(x, b, h, first), x.row);
    default: return run(row_of<const Half>(x, b, h, first), x.row);
  }
}

// Products of Q queries, (Q, dim), with K keys into a tile of scores.
template <int Q, int K, typename S>
void dot(float* score, const float* query, const S* keys, int64_t stride, int64_t dim) {
  Vec sum[Q][K];
  for (int q = 0; q < Q; ++q) {
    for (int k = 0; k < K; ++k) {
      sum[q][k] = Vec(0.f);
    }
  }
  for (int64_t d = 0; d < dim; d += Vec::size()) {
    Vec key[K];
    for (int k = 0; k < K; ++k) {
      key[k] = widened(keys + k * stride + d);
    }
    for (int q = 0; q < Q; ++q) {
      const Vec one = Vec::loadu(query + q * dim + d);
      for (int k = 0; k < K; ++k) {
        sum[q][k] = at::vec::fmadd(one, key[k], sum[q][k]);
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int k = 0; k < K; ++k) {
      score[q * KEYS + k] = total(sum[q][k]);
    }
  }
}

template <int Q, int K, typename S>
void dot_keys(float* score, const float* query, const S* keys, int64_t stride, int64_t n, int64_t dim) {
  int64_t k = 0;
  for (; k + K <= n; k += K) {
    dot<Q, K>(score + k, query, keys + k * stride, stride, dim);
  }
  for (; k < n; ++k) {
    dot<Q, 1>(score + k, query, keys + k * stride, stride, dim);
  }
}

// Scores (queries, KEYS) of n keys; 0 beyond them.
template <typename S>
void multiply_keys(float* score, const float* query, int64_t queries, const S* keys, int64_t stride, int64_t n,
                   int64_t dim) {
  std::fill_n(score, n < KEYS ? queries * KEYS : 0, 0.f);
  for (; queries >= 4; queries -= 4, score += 4 * KEYS, query += 4 * dim) {
    dot_keys<4, 2>(score, query, keys, stride, n, dim);
  }
  for (; queries > 0; --queries, score += KEYS, query += dim) {
    dot_keys<1, 4>(score, query, keys, stride, n, dim);
  }
}

// output (R, ld) += weight (R, KEYS) times V vectors of each of n values; values that no row sees are not read.
template <int R, int V, typename S>
void add_vectors(float* output, int64_t ld, const float* weight, const S* values, int64_t stride, const uint8_t* seen,
                 int64_t n) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sum[r][v] = Vec::loadu(output + r * ld + v * Vec::size());
    }
  }
  for (int64_t j = 0; j < n; ++j, values += stride) {
    if (!seen[j]) {
      continue;
    }
    Vec value[V];
    for (int v = 0; v < V; ++v) {
      value[v] = widened(values + v * Vec::size());
    }
    for (int r = 0; r < R; ++r) {
      const Vec one(weight[r * KEYS + j]);
      for (int v = 0; v < V; ++v) {
        sum[r][v] = at::vec::fmadd(one, value[v], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sum[r][v].store(output + r * ld + v * Vec::size());
    }
  }
}

template <int R, typename S>
void add_rows(float* output, int64_t ld, const float* weight, const S* values, int64_t stride, const uint8_t* seen,
              int64_t n) {
  constexpr int V = 8 / R;
  int64_t d = 0;
  for (; d + V * Vec::size() <= ld; d += V * Vec::size()) {
    add_vectors<R, V>(output + d, ld, weight, values + d, stride, seen, n);
  }
  for (; d < ld; d += Vec::size()) {
    add_vectors<R, 1>(output + d, ld, weight, values + d, stride, seen, n);
  }
}

// output (rows, ld) += weight (rows, KEYS) x n values.
template <typename S>
void add_values(float* output, int64_t ld, const float* weight, int64_t rows, const S* values, int64_t stride,
                const uint8_t* seen, int64_t n) {
  for (; rows >= 4; rows -= 4, output += 4 * ld, weight += 4 * KEYS) {
    add_rows<4>(output, ld, weight, values, stride, seen, n);
  }
  for (; rows > 0; --rows, output += ld, weight += KEYS) {
    add_rows<1>(output, ld, weight, values, stride, seen, n);
  }
}

}  // namespace
}  // namespace eah::cpu::CPU_CAPABILITY
