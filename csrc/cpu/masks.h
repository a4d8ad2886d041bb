// Who sees whom, as eah_kernels/masks.py defines it: by position, by every form of mask, and which rows count.
#pragma once

#include "tiles.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

namespace eah::cpu::CPU_CAPABILITY {
namespace {

// The keys a row can see by its position, [first, last).
struct Span {
  int64_t first, last;
};

Span span_of(const Problem& p, int64_t row) {
  const int64_t position = row + p.kv_len - p.q_len;
  const int64_t first = p.scoring.window ? std::max<int64_t>(0, position - p.scoring.window + 1) : 0;
  return {first, p.scoring.causal ? position + 1 : p.kv_len};
}

// What the mask adds to row `row`'s scores of a tile's keys, -inf where it hides the key.
template <typename S>
void bias_as(float* bias, const View& mask, int64_t offset, int64_t n) {
  const S* from = static_cast<const S*>(mask.data) + offset;
  const int64_t stride = mask.column;
  for (int64_t j = 0; j < n; ++j) {
    const S entry = from[j * stride];
    if constexpr (std::is_same_v<S, bool>) {
      bias[j] = entry ? 0.f : -INF;
    } else {
      using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;
      const Wide wide = static_cast<Wide>(entry);
      bias[j] = wide > static_cast<Wide>(std::numeric_limits<S>::lowest()) / 2 ? static_cast<float>(wide) : -INF;
    }
  }
}

void mask_bias(float* bias, const Problem& p, int64_t b, int64_t h, int64_t row, int64_t tile) {
  const View& mask = p.scoring.mask;
  const int64_t first = tile * KEYS, n = std::min(KEYS, p.kv_len - first);
  const int64_t offset =
      b * mask.b + h * mask.h + row * mask.row + first * mask.column;
  switch (p.scoring.mask_dtype) {
    case Dtype::Bool: return bias_as<bool>(bias, mask, offset, n);
    case Dtype::Half: return bias_as<Half>(bias, mask, offset, n);
    case Dtype::BFloat16: return bias_as<BFloat16>(bias, mask, offset, n);
    case Dtype::Float: return bias_as<float>(bias, mask, offset, n);
    default: return bias_as<double>(bias, mask, offset, n);
  }
}

// Who sees whom, by key and by row, for one batch row and mask head.
struct Visibility {
  std::vector<uint8_t> counting;  // (Sq): the row sees its own key
  std::vector<int32_t> seen_by;   // (Skv): counting rows that see the key, its own row left out
  std::vector<uint8_t> seen;      // (Skv): some row sees the key
};

// From where each row's span begins and ends; the mask, if any, depends on the key alone.
void by_position(Visibility& v, const Problem& p, int64_t b, int64_t h) {
  const int64_t offset = p.kv_len - p.q_len;
  std::vector<int32_t> all(p.kv_len + 1), counted(p.kv_len + 1);
  for (int64_t row = 0; row < p.q_len; ++row) {
    const Span span = span_of(p, row);
    if (span.first < span.last) {
      all[span.first] += 1;
      all[span.last] -= 1;
      counted[span.first] += v.counting[row];
      counted[span.last] -= v.counting[row];
    }
  }
  int32_t rows = 0, counting = 0;
  float bias[KEYS] = {};
  for (int64_t j = 0; j < p.kv_len; ++j) {
    rows += all[j];
    counting += counted[j];
    if (p.scoring.mask.data && j % KEYS == 0) {
      mask_bias(bias, p, b, h, 0, j / KEYS);
    }
    const bool shown = bias[j % KEYS] > -INF;
    v.seen[j] = shown && rows > 0;
    v.seen_by[j] = shown ? counting - (j >= offset && v.counting[j - offset]) : 0;
  }
}

// Entry by entry, for a mask with a row dimension.
void by_entry(Visibility& v, const Problem& p, int64_t b, int64_t h) {
  const int64_t offset = p.kv_len - p.q_len;
  at::parallel_for(0, tiles(p.kv_len), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tile * KEYS, n = std::min(KEYS, p.kv_len - start);
      int32_t seen[KEYS] = {}, seen_by[KEYS] = {};
      for (int64_t row = 0; row < p.q_len; ++row) {
        const Span span = span_of(p, row);
        const int64_t from = std::max<int64_t>(span.first - start, 0), to = std::min(span.last - start, n);
        if (from >= to) {
          continue;
        }
        float bias[KEYS];
        mask_bias(bias, p, b, h, row, tile);
        const int32_t counts = v.counting[row];
        for (int64_t j = from; j < to; ++j) {
          const int32_t sees = bias[j] > -INF;
          seen[j] |= sees;
          seen_by[j] += counts & sees;
        }
        const int64_t own = row + offset - start;
        if (own >= 0 && own < n) {
          seen_by[own] -= counts;
        }
      }
      std::copy(seen, seen + n, v.seen.begin() + start);
      std::copy(seen_by, seen_by + n, v.seen_by.begin() + start);
    }
  });
}

Visibility visibility(const Problem& p, int64_t b, int64_t h) {
  Visibility v{std::vector<uint8_t>(p.q_len), std::vector<int32_t>(p.kv_len), std::vector<uint8_t>(p.kv_len)};
  const View& mask = p.scoring.mask;
  const int64_t offset = p.kv_len - p.q_len;
  for (int64_t row = std::max<int64_t>(0, -offset); row < p.q_len; ++row) {
    float bias[KEYS] = {};
    if (mask.data) {
      mask_bias(bias, p, b, h, row, (row + offset) / KEYS);
    }
    v.counting[row] = bias[(row + offset) % KEYS] > -INF;
  }
  mask.row == 0 ? by_position(v, p, b, h) : by_entry(v, p, b, h);
  return v;
}

// Of heads first_head, ...: one for each where the mask has heads, else one for all.
std::vector<Visibility> visibilities(const Problem& p, int64_t b, int64_t first_head, int64_t heads) {
  std::vector<Visibility> rules;
  for (int64_t h = 0; h < (p.scoring.mask_heads > 1 ? heads : 1); ++h) {
    rules.push_back(visibility(p, b, first_head + h));
  }
  return rules;
}

}  // namespace
}  // namespace eah::cpu::CPU_CAPABILITY
