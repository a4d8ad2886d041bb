// EAH on the CPU (arXiv 2411.09968), in tiles of 64 query rows by 64 keys. Compiled once per CPU capability.
//
// A row block's scores, all its key tiles, stay in one thread's cache: one QK product, one exp, and from the finished
// row sums the column sums (statistics) or the normalised map times every value head (attend). The products are
// oneDNN's micro-kernels through ATen: float32, or bfloat16 with float32 sums where the processor multiplies bfloat16.
// A work item's result depends on nothing but its inputs, so the number of threads changes no bit.

#include "few_rows.h"
#include "scores.h"

#include <ATen/Context.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace eah::cpu::CPU_CAPABILITY {
namespace {

// One thread's row block: scores of the block's key tiles, (tiles, 64, 64), and what the rows' softmax needs.
template <typename T>
struct RowBlock {
  Buffer<float> score, sum, output;
  Buffer<T> query, map;
  int64_t first_tile = 0, end_tile = 0, rows = 0, padded_rows = 0;
  float max[ROWS], inverse[ROWS];

  RowBlock(const Problem& p, int64_t value_dim)
      : score(tiles(p.kv_len) * TILE),
        sum(ROWS * Vec::size()),
        output(ROWS * padded_value_dim(value_dim)),
        query(ROWS * padded_dim<T>(p.dim)),
        map(std::is_same_v<T, float> || value_dim == 0 ? 0 : tiles(p.kv_len) * TILE) {}

  float* tile(int64_t t) const {
    return score.data() + (t - first_tile) * TILE;
  }
};

// exp(score - row maximum) of rows row0.. of head h against packed keys; 1 / row sum, 0 for a row that sees no key.
template <typename T>
void make_weights(RowBlock<T>& block, const Problem& p, int64_t b, int64_t h, int64_t row0, const T* keys,
                  float* lse = nullptr) {
  const int64_t dim = padded_dim<T>(p.dim);
  block.rows = std::min(ROWS, p.q_len - row0);
  block.padded_rows = round_up(block.rows, 8);
  const Span first = span_of(p, row0), last = span_of(p, row0 + block.rows - 1);
  block.first_tile = first.first / KEYS;
  block.end_tile = std::max(block.first_tile, tiles(last.last));

  load(block.query.data(), dim, p.query, p.dtype, b, h, row0, block.rows, p.dim);
  std::fill(block.query.data() + block.rows * dim, block.query.data() + block.padded_rows * dim, T(0));
  float* lanes = block.sum.data();
  std::fill_n(lanes, block.rows * Vec::size(), -INF);
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    multiply(block.padded_rows, KEYS, dim, block.query.data(), keys + t * KEYS * dim, block.tile(t), false);
    finish_scores(block.tile(t), lanes, p, b, h, row0, block.rows, t);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    block.max[r] = largest(lanes + r * Vec::size());
  }
  std::fill_n(lanes, block.rows * Vec::size(), 0.f);
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    exponentials(block.tile(t), lanes, block.max, block.rows);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    float sum = total(Vec::loadu(lanes + r * Vec::size()));
    sum = std::isnan(block.max[r]) ? block.max[r] : sum;
    block.inverse[r] = block.max[r] == -INF ? 0.f : 1 / sum;
    if (lse) {
      lse[row0 + r] = block.max[r] == -INF ? -INF : block.max[r] + std::log(sum);
    }
  }
}

// Adds the block's probabilities, down the rows that count and off the diagonal, to column sums over all keys.
template <typename T>
void add_columns(RowBlock<T>& block, const Problem& p, int64_t row0, const uint8_t* counting, Span image,
                 float* columns) {
  const int64_t offset = p.kv_len - p.q_len;
  const int64_t begin = std::max(block.first_tile, image.first / KEYS);
  for (int64_t t = begin; t < std::min(block.end_tile, tiles(image.last)); ++t) {
    float* x = block.tile(t);
    float* column = columns + t * KEYS;
    Vec sum[KEYS / Vec::size()];
    for (int64_t v = 0; v < KEYS / Vec::size(); ++v) {
      sum[v] = Vec::loadu(column + v * Vec::size());
    }
    for (int64_t r = 0; r < block.rows; ++r, x += KEYS) {
      if (!counting[row0 + r]) {
        continue;
      }
      const int64_t own = row0 + r + offset - t * KEYS;
      if (own >= 0 && own < KEYS) {
        x[own] = 0;
      }
      const Vec weight(block.inverse[r]);
      for (int64_t v = 0; v < KEYS / Vec::size(); ++v) {
        sum[v] = at::vec::fmadd(Vec::loadu(x + v * Vec::size()), weight, sum[v]);
      }
    }
    for (int64_t v = 0; v < KEYS / Vec::size(); ++v) {
      sum[v].store(column + v * Vec::size());
    }
  }
}

template <typename T>
Buffer<T> packed_keys(const Problem& p, int64_t b, int64_t first_head, int64_t heads) {
  const int64_t n = tiles(p.kv_len), head_size = n * KEYS * padded_dim<T>(p.dim);
  Buffer<T> packed(heads * head_size);
  for_each_item(
      heads * n, [&] { return Buffer<T>(KEYS * padded_dim<T>(p.dim)); },
      [&](int64_t item, Buffer<T>& scratch) {
        const int64_t h = item / n;
        pack_keys(packed.data() + h * head_size, p, b, first_head + h, item % n, scratch.data());
      });
  return packed;
}

// As few_rows_statistics.
template <typename T>
void statistics_as(const Problem& p, int64_t b, const bool* image, float* mean, float* lse) {
  const int64_t blocks = (p.q_len + ROWS - 1) / ROWS, chunks = std::min(CHUNKS, blocks);
  const int64_t group = p.heads / p.kv_heads, kv_padded = tiles(p.kv_len) * KEYS;
  const int64_t head_size = kv_padded * padded_dim<T>(p.dim);
  const Span span = image_span(image, p.kv_len);
  const std::vector<Visibility> rules = visibilities(p, b, 0, p.heads);
  const Buffer<T> keys = packed_keys<T>(p, b, 0, p.kv_heads);
  const Buffer<float> partial(p.heads * chunks * kv_padded);
  for_each_item(
      p.heads * chunks, [&] { return RowBlock<T>(p, 0); },
      [&](int64_t item, RowBlock<T>& block) {
        const int64_t h = item / chunks;
        float* columns = partial.data() + item * kv_padded;
        std::fill_n(columns, kv_padded, 0.f);
        for (int64_t n = item % chunks; n < blocks; n += chunks) {
          const int64_t row0 = n * ROWS, end = std::min(row0 + ROWS, p.q_len);
          const bool sees_image = span_of(p, row0).first < span.last && span_of(p, end - 1).last > span.first;
          if (!sees_image && !lse) {
            continue;
          }
          make_weights(block, p, b, h, row0, keys.data() + h / group * head_size,
                       lse ? lse + h * p.q_len : nullptr);
          add_columns(block, p, row0, rules[h % p.scoring.mask_heads].counting.data(), span, columns);
        }
      });
  for (int64_t h = 0; h < p.heads; ++h) {
    const auto& seen_by = rules[h % p.scoring.mask_heads].seen_by;
    for (int64_t j = span.first; j < span.last; ++j) {
      float sum = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        sum += partial.data()[(h * chunks + c) * kv_padded + j];
      }
      mean[h * p.kv_len + j] = image[j] && seen_by[j] > 0 ? sum / static_cast<float>(seen_by[j]) : 0.f;
    }
  }
}

// The block's probabilities as the left operand of the products with the values, (tiles, 64, 64).
template <typename T>
const T* normalised(RowBlock<T>& block) {
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    float* x = block.tile(t);
    for (int64_t r = 0; r < block.rows; ++r, x += KEYS) {
      const Vec weight(block.inverse[r]);
      for (int64_t j = 0; j < KEYS; j += Vec::size()) {
        (Vec::loadu(x + j) * weight).store(x + j);
      }
      if constexpr (!std::is_same_v<T, float>) {
        at::vec::convert(x, block.map.data() + (x - block.score.data()), KEYS);
      }
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    return block.score.data();
  } else {
    return block.map.data();
  }
}

// The block's map times one head's values, written as heads first_head..first_head+copies of the output.
template <typename T>
void times_values(RowBlock<T>& block, const Problem& p, const T* map, const T* packed, int64_t value_dim,
                  const View& output, int64_t b, int64_t row0, int64_t first_head, int64_t copies) {
  const int64_t ld = padded_value_dim(value_dim);
  float* product = block.output.data();
  if (block.first_tile == block.end_tile) {
    std::fill_n(product, block.rows * ld, 0.f);
  }
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    multiply(block.padded_rows, ld, KEYS, map + (t - block.first_tile) * TILE, packed + t * KEYS * ld, product,
             t > block.first_tile);
  }
  for (int64_t h = first_head; h < first_head + copies; ++h) {
    store(output, p.dtype, b, h, row0, block.rows, product, ld, value_dim);
  }
}

template <typename T>
void attend_as(const Problem& p, int64_t b, const Values& values, int64_t head, const View& output) {
  const int64_t blocks = (p.q_len + ROWS - 1) / ROWS, group = p.heads / p.kv_heads, n = tiles(p.kv_len);
  const int64_t key_size = n * KEYS * padded_dim<T>(p.dim), value_size = n * KEYS * padded_value_dim(values.dim);
  const bool shared = head >= 0;
  // Ordinary attention under a mask per head sees other keys in each head: each gets its own values.
  const bool per_head = !shared && p.scoring.mask_heads > 1;
  const int64_t value_heads = per_head ? p.heads : p.kv_heads;
  const std::vector<Visibility> rules = visibilities(p, b, shared ? head : 0, shared ? 1 : p.heads);
  const Buffer<T> keys = shared ? packed_keys<T>(p, b, head / group, 1) : packed_keys<T>(p, b, 0, p.kv_heads);
  const Buffer<T> packed(value_heads * value_size);
  for_each_item(
      value_heads * n, [&] { return Buffer<T>(KEYS * padded_value_dim(values.dim)); },
      [&](int64_t item, Buffer<T>& scratch) {
        const int64_t h = item / n;
        pack_values(packed.data() + h * value_size, p, values, rules[per_head ? h : 0].seen.data(), b,
                    per_head ? h / group : h, item % n, scratch.data());
      });
  // The last row blocks, the largest under a causal mask, go first. A map is computed again for every share of the
  // value heads, so there are only as many shares as keep the threads busy.
  const int64_t wanted = (4 * at::get_num_threads() + blocks - 1) / blocks;
  const int64_t shares = shared ? std::min(p.kv_heads, wanted) : p.kv_heads;
  for_each_item(
      blocks * shares, [&] { return RowBlock<T>(p, values.dim); },
      [&](int64_t item, RowBlock<T>& block) {
        const int64_t row0 = (blocks - 1 - item / shares) * ROWS, share = item % shares;
        if (shared) {
          make_weights(block, p, b, head, row0, keys.data());
          const T* map = normalised(block);
          for (int64_t h = share; h < p.kv_heads; h += shares) {
            times_values(block, p, map, packed.data() + h * value_size, values.dim, output, b, row0, h * group,
                         group);
          }
          return;
        }
        for (int64_t h = share * group; h < (share + 1) * group; ++h) {
          make_weights(block, p, b, h, row0, keys.data() + share * key_size);
          times_values(block, p, normalised(block), packed.data() + (per_head ? h : share) * value_size, values.dim,
                       output, b, row0, h, 1);
        }
      });
}

// bfloat16 stays bfloat16 where the processor multiplies it; elsewhere, and float16 always, goes through float32.
bool multiplies_bfloat16(Dtype dtype) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return dtype == Dtype::BFloat16 && supported && at::hasMKLDNN() && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

}  // namespace

void statistics(const Problem& p, const bool* image_mask, float* mean, float* lse) {
  std::fill_n(mean, p.batch * p.heads * p.kv_len, 0.f);
  for (int64_t b = 0; b < p.batch; ++b, mean += p.heads * p.kv_len) {
    const bool *image = image_mask + b * p.kv_len, *end = image + p.kv_len;
    if (!lse && std::find(image, end, true) == end) {
      continue;
    }
    float* row_lse = lse ? lse + b * p.heads * p.q_len : nullptr;
    if (takes_few_rows(p, false)) {
      few_rows_statistics(p, b, image, mean, row_lse);
    } else if (multiplies_bfloat16(p.dtype)) {
      statistics_as<BFloat16>(p, b, image, mean, row_lse);
    } else {
      statistics_as<float>(p, b, image, mean, row_lse);
    }
  }
}

void attend(const Problem& p, const Values& values, const int32_t* head, const View& output) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (takes_few_rows(p, head[b] >= 0)) {
      few_rows_attend(p, b, values, head[b], output);
    } else if (multiplies_bfloat16(p.dtype)) {
      attend_as<BFloat16>(p, b, values, head[b], output);
    } else {
      attend_as<float>(p, b, values, head[b], output);
    }
  }
}

}  // namespace eah::cpu::CPU_CAPABILITY
