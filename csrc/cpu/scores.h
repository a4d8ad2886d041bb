// From products to a softmax, tile by tile: what prefill.cpp and few_rows.cpp share. A tile is some rows by 64 keys.
#pragma once

#include "masks.h"

namespace eah::cpu::CPU_CAPABILITY {
namespace {

// Scores of one tile in place: scaled, capped, biased, -inf where hidden. Raises the lanes of the rows' maxima.
void finish_scores(float* score, float* lanes, const Problem& p, int64_t b, int64_t h, int64_t row0, int64_t rows,
                   int64_t tile) {
  const Scoring& scoring = p.scoring;
  const Vec hidden(-INF), scale(scoring.softcap ? scoring.scale / scoring.softcap : scoring.scale);
  const int64_t start = tile * KEYS;
  float bias[KEYS] = {};
  for (int64_t r = 0; r < rows; ++r, score += KEYS, lanes += Vec::size()) {
    const Span span = span_of(p, row0 + r);
    const int64_t from = std::clamp<int64_t>(span.first - start, 0, KEYS);
    const int64_t to = std::clamp<int64_t>(span.last - start, from, KEYS);
    if (scoring.mask.data && (r == 0 || scoring.mask.row != 0)) {
      mask_bias(bias, p, b, h, row0 + r, tile);
    }
    Vec top = Vec::loadu(lanes);
    for (int64_t j = 0; j < KEYS; j += Vec::size()) {
      Vec x = Vec::loadu(score + j) * scale;
      if (scoring.softcap) {
        x = x.tanh() * Vec(scoring.softcap);
      }
      if (scoring.mask.data) {
        const Vec add = Vec::loadu(bias + j);
        x = Vec::blendv(x + add, hidden, add == hidden);
      }
      if (from > j || to < j + Vec::size()) {
        x.store(score + j);
        std::fill(score + j, score + std::clamp<int64_t>(from, j, j + Vec::size()), -INF);
        std::fill(score + std::clamp<int64_t>(to, j, j + Vec::size()), score + j + Vec::size(), -INF);
        x = Vec::loadu(score + j);
      }
      x.store(score + j);
      top = at::vec::maximum(top, x);
    }
    top.store(lanes);
  }
}

// Scores of one tile in place to exp(score - row maximum), which are added to the lanes of the rows' sums.
void exponentials(float* score, float* lanes, const float* max, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r, score += KEYS, lanes += Vec::size()) {
    const Vec top(max[r] == -INF ? 0.f : max[r]);
    Vec sum = Vec::loadu(lanes);
    for (int64_t j = 0; j < KEYS; j += Vec::size()) {
      const Vec e = (Vec::loadu(score + j) - top).exp_u20();
      e.store(score + j);
      sum = sum + e;
    }
    sum.store(lanes);
  }
}

// From the first image token to the last; empty without any.
Span image_span(const bool* image, int64_t kv_len) {
  Span span = {std::find(image, image + kv_len, true) - image, kv_len};
  while (span.last > span.first && !image[span.last - 1]) {
    --span.last;
  }
  return span;
}

}  // namespace
}  // namespace eah::cpu::CPU_CAPABILITY
