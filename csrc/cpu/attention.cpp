// EAH on the CPU (arXiv 2411.09968), in tiles of 64 query rows by 64 keys. Compiled once per CPU capability.
//
// A row block's scores, all its key tiles, stay in one thread's cache: one QK product, one exp, and from the finished
// row sums the column sums (statistics) or the normalised map times every value head (attend). The products are
// oneDNN's micro-kernels through ATen: float32, or bfloat16 with float32 sums where the processor multiplies bfloat16.
// A work item's result depends on nothing but its inputs, so the number of threads changes no bit.

#include "attention.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace eah::CPU_CAPABILITY {
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

// Rows first..first+rows of head h as (rows, ld), ld >= dim, zero beyond dim.
template <typename S, typename T>
void load_as(T* to, int64_t ld, const Operand& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim) {
  const S* from = static_cast<const S*>(x.data) + b * x.strides[0] + h * x.strides[1] + first * x.strides[2];
  for (int64_t r = 0; r < rows; ++r, from += x.strides[2], to += ld) {
    if (x.strides[3] == 1) {
      at::vec::convert(from, to, dim);
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        to[d] = static_cast<T>(from[d * x.strides[3]]);
      }
    }
    std::fill(to + dim, to + ld, T(0));
  }
}

template <typename T>
void load(T* to, int64_t ld, const Operand& x, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t dim) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    load_as<BFloat16>(to, ld, x, b, h, first, rows, dim);
  } else if (x.dtype == at::kFloat) {
    load_as<float>(to, ld, x, b, h, first, rows, dim);
  } else if (x.dtype == at::kBFloat16) {
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
  load(scratch, ld, p.key, b, h, first, rows, p.dim);
  std::fill(scratch + rows * ld, scratch + KEYS * ld, T(0));
  at::vec::transpose_mxn<float>(
      reinterpret_cast<const float*>(scratch), units, reinterpret_cast<float*>(packed + tile * KEYS * ld), KEYS,
      static_cast<int>(KEYS), static_cast<int>(units));
}

// Value tiles of one head, (tiles, 64, Dv), for bfloat16 (tiles, 32, Dv, 2); zero where no row sees the key.
template <typename T>
void pack_values(
    T* packed, const Operand& value, int64_t value_dim, int64_t kv_len, const uint8_t* seen, int64_t b, int64_t h,
    int64_t tile, T* scratch) {
  const int64_t first = tile * KEYS, rows = std::min(KEYS, kv_len - first), ld = padded_value_dim(value_dim);
  packed += tile * KEYS * ld;
  T* plain = std::is_same_v<T, float> ? packed : scratch;
  load(plain, ld, value, b, h, first, rows, value_dim);
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
void bias_as(float* bias, const Operand& mask, int64_t offset, int64_t n) {
  const S* from = static_cast<const S*>(mask.data) + offset;
  const int64_t stride = mask.strides[3];
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
  const Operand& mask = p.scoring.mask;
  const int64_t first = tile * KEYS, n = std::min(KEYS, p.kv_len - first);
  const int64_t offset =
      b * mask.strides[0] + h * mask.strides[1] + row * mask.strides[2] + first * mask.strides[3];
  switch (mask.dtype) {
    case at::kBool: return bias_as<bool>(bias, mask, offset, n);
    case at::kHalf: return bias_as<Half>(bias, mask, offset, n);
    case at::kBFloat16: return bias_as<BFloat16>(bias, mask, offset, n);
    case at::kFloat: return bias_as<float>(bias, mask, offset, n);
    default: return bias_as<double>(bias, mask, offset, n);
  }
}

// Who sees whom, by key and by row, for one batch row and mask head.
struct Visibility {
  std::vector<uint8_t> counting;  // (Sq): the row sees its own key
  std::vector<int32_t> seen_by;   // (Skv): counting rows that see the key, its own row left out
  std::vector<uint8_t> seen;      // (Skv): some row sees the key
};

Visibility visibility(const Problem& p, int64_t b, int64_t h) {
  Visibility v{std::vector<uint8_t>(p.q_len), std::vector<int32_t>(p.kv_len), std::vector<uint8_t>(p.kv_len)};
  const int64_t offset = p.kv_len - p.q_len;
  const bool masked = p.scoring.mask.data != nullptr;
  for (int64_t row = std::max<int64_t>(0, -offset); row < p.q_len; ++row) {
    const int64_t own = row + offset;
    float bias[KEYS] = {};
    if (masked) {
      mask_bias(bias, p, b, h, row, own / KEYS);
    }
    v.counting[row] = bias[own % KEYS] > -INF;
  }
  at::parallel_for(0, tiles(p.kv_len), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t start = tile * KEYS, stop = std::min(p.kv_len, start + KEYS);
      for (int64_t row = 0; row < p.q_len; ++row) {
        const Span span = span_of(p, row);
        const int64_t from = std::max(span.first, start), to = std::min(span.last, stop), own = row + offset;
        float bias[KEYS] = {};
        if (masked && from < to) {
          mask_bias(bias, p, b, h, row, tile);
        }
        const int32_t counts = v.counting[row];
        for (int64_t j = from; j < to; ++j) {
          const bool sees = bias[j - start] > -INF;
          v.seen[j] |= sees;
          v.seen_by[j] += counts & sees;
        }
        if (counts && own >= start && own < stop) {
          v.seen_by[own] -= 1;
        }
      }
    }
  });
  return v;
}

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

// Scores of one tile in place: scaled, capped, biased, -inf where hidden. Raises the rows' running maxima.
void finish_scores(float* score, float* maxima, const Problem& p, int64_t b, int64_t h, int64_t row0, int64_t rows,
                   int64_t tile) {
  const Scoring& scoring = p.scoring;
  const Vec hidden(-INF), scale(scoring.softcap ? scoring.scale / scoring.softcap : scoring.scale);
  const int64_t start = tile * KEYS;
  for (int64_t r = 0; r < rows; ++r, score += KEYS) {
    for (int64_t j = 0; j < KEYS; j += Vec::size()) {
      Vec x = Vec::loadu(score + j) * scale;
      if (scoring.softcap) {
        x = x.tanh() * Vec(scoring.softcap);
      }
      x.store(score + j);
    }
    if (scoring.mask.data) {
      float bias[KEYS] = {};
      mask_bias(bias, p, b, h, row0 + r, tile);
      for (int64_t j = 0; j < KEYS; j += Vec::size()) {
        const Vec add = Vec::loadu(bias + j);
        Vec::blendv(Vec::loadu(score + j) + add, hidden, add == hidden).store(score + j);
      }
    }
    const Span span = span_of(p, row0 + r);
    const int64_t from = std::clamp<int64_t>(span.first - start, 0, KEYS);
    const int64_t to = std::clamp<int64_t>(span.last - start, from, KEYS);
    std::fill(score, score + from, -INF);
    std::fill(score + to, score + KEYS, -INF);
    Vec top = Vec::loadu(maxima + r * Vec::size());
    for (int64_t j = 0; j < KEYS; j += Vec::size()) {
      top = at::vec::maximum(top, Vec::loadu(score + j));
    }
    top.store(maxima + r * Vec::size());
  }
}

// exp(score - row maximum) of rows row0.. of head h against packed keys; 1 / row sum, 0 for a row that sees no key.
template <typename T>
void exponentials(RowBlock<T>& block, const Problem& p, int64_t b, int64_t h, int64_t row0, const T* keys,
                  float* lse = nullptr) {
  const int64_t dim = padded_dim<T>(p.dim);
  block.rows = std::min(ROWS, p.q_len - row0);
  block.padded_rows = round_up(block.rows, 8);
  const Span first = span_of(p, row0), last = span_of(p, row0 + block.rows - 1);
  block.first_tile = first.first / KEYS;
  block.end_tile = std::max(block.first_tile, tiles(last.last));

  load(block.query.data(), dim, p.query, b, h, row0, block.rows, p.dim);
  std::fill(block.query.data() + block.rows * dim, block.query.data() + block.padded_rows * dim, T(0));
  float* lanes = block.sum.data();
  std::fill_n(lanes, block.rows * Vec::size(), -INF);
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    multiply(block.padded_rows, KEYS, dim, block.query.data(), keys + t * KEYS * dim, block.tile(t), false);
    finish_scores(block.tile(t), lanes, p, b, h, row0, block.rows, t);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    const Vec lane = Vec::loadu(lanes + r * Vec::size());
    block.max[r] = at::vec::vec_reduce_all<float>([](Vec& a, Vec& c) { return at::vec::maximum(a, c); }, lane);
  }
  std::fill_n(lanes, block.rows * Vec::size(), 0.f);
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    float* x = block.tile(t);
    for (int64_t r = 0; r < block.rows; ++r, x += KEYS) {
      const Vec top(block.max[r] == -INF ? 0.f : block.max[r]);
      Vec sum = Vec::loadu(lanes + r * Vec::size());
      for (int64_t j = 0; j < KEYS; j += Vec::size()) {
        const Vec e = (Vec::loadu(x + j) - top).exp_u20();
        e.store(x + j);
        sum = sum + e;
      }
      sum.store(lanes + r * Vec::size());
    }
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    const Vec lane = Vec::loadu(lanes + r * Vec::size());
    float sum = at::vec::vec_reduce_all<float>([](Vec& a, Vec& c) { return a + c; }, lane);
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

template <typename T>
void statistics_as(const Problem& p, const bool* image_mask, float* mean, float* lse) {
  const int64_t blocks = (p.q_len + ROWS - 1) / ROWS, chunks = std::min(CHUNKS, blocks);
  const int64_t group = p.heads / p.kv_heads, kv_padded = tiles(p.kv_len) * KEYS;
  const int64_t head_size = kv_padded * padded_dim<T>(p.dim);
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool* image = image_mask + b * p.kv_len;
    float* row_mean = mean + b * p.heads * p.kv_len;
    std::fill_n(row_mean, p.heads * p.kv_len, 0.f);
    const int64_t image_first = std::find(image, image + p.kv_len, true) - image;
    int64_t image_last = p.kv_len;
    while (image_last > image_first && !image[image_last - 1]) {
      --image_last;
    }
    if (image_first == image_last && !lse) {
      continue;
    }
    std::vector<Visibility> rules;
    for (int64_t h = 0; h < p.scoring.mask_heads; ++h) {
      rules.push_back(visibility(p, b, h));
    }
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
            const bool sees_image = span_of(p, row0).first < image_last && span_of(p, end - 1).last > image_first;
            if (!sees_image && !lse) {
              continue;
            }
            exponentials(block, p, b, h, row0, keys.data() + h / group * head_size,
                         lse ? lse + (b * p.heads + h) * p.q_len : nullptr);
            add_columns(block, p, row0, rules[h % p.scoring.mask_heads].counting.data(), {image_first, image_last},
                        columns);
          }
        });
    for (int64_t h = 0; h < p.heads; ++h) {
      const auto& seen_by = rules[h % p.scoring.mask_heads].seen_by;
      for (int64_t j = image_first; j < image_last; ++j) {
        float sum = 0;
        for (int64_t c = 0; c < chunks; ++c) {
          sum += partial.data()[(h * chunks + c) * kv_padded + j];
        }
        row_mean[h * p.kv_len + j] = image[j] && seen_by[j] > 0 ? sum / static_cast<float>(seen_by[j]) : 0.f;
      }
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

template <typename S>
void store_as(const Operand& output, int64_t b, int64_t h, int64_t row0, int64_t rows, const float* from, int64_t ld,
              int64_t dim) {
  S* to = static_cast<S*>(const_cast<void*>(output.data)) + b * output.strides[0] + h * output.strides[1];
  for (int64_t r = 0; r < rows; ++r) {
    at::vec::convert(from + r * ld, to + (row0 + r) * output.strides[2], dim);
  }
}

// The block's map times one head's values, written as heads first_head..first_head+copies of the output.
template <typename T>
void times_values(RowBlock<T>& block, const T* map, const T* values, int64_t value_dim, const Operand& output,
                  int64_t b, int64_t row0, int64_t first_head, int64_t copies) {
  const int64_t ld = padded_value_dim(value_dim);
  float* product = block.output.data();
  if (block.first_tile == block.end_tile) {
    std::fill_n(product, block.rows * ld, 0.f);
  }
  for (int64_t t = block.first_tile; t < block.end_tile; ++t) {
    multiply(block.padded_rows, ld, KEYS, map + (t - block.first_tile) * TILE, values + t * KEYS * ld, product,
             t > block.first_tile);
  }
  for (int64_t h = first_head; h < first_head + copies; ++h) {
    switch (output.dtype) {
      case at::kFloat: store_as<float>(output, b, h, row0, block.rows, product, ld, value_dim); break;
      case at::kBFloat16: store_as<BFloat16>(output, b, h, row0, block.rows, product, ld, value_dim); break;
      default: store_as<Half>(output, b, h, row0, block.rows, product, ld, value_dim);
    }
  }
}

template <typename T>
void attend_as(const Problem& p, const Operand& value, int64_t value_dim, const int32_t* head, const Operand& output) {
  const int64_t blocks = (p.q_len + ROWS - 1) / ROWS, group = p.heads / p.kv_heads, n = tiles(p.kv_len);
  const int64_t key_size = n * KEYS * padded_dim<T>(p.dim), value_size = n * KEYS * padded_value_dim(value_dim);
  for (int64_t b = 0; b < p.batch; ++b) {
    const bool shared = head[b] >= 0;
    // Ordinary attention under a mask per head sees other keys in each head: each gets its own values.
    const bool per_head = !shared && p.scoring.mask_heads > 1;
    const int64_t value_heads = per_head ? p.heads : p.kv_heads;
    std::vector<Visibility> rules;
    for (int64_t h = 0; h < (per_head ? p.heads : 1); ++h) {
      rules.push_back(visibility(p, b, shared ? head[b] : h));
    }
    const Buffer<T> keys = shared ? packed_keys<T>(p, b, head[b] / group, 1) : packed_keys<T>(p, b, 0, p.kv_heads);
    const Buffer<T> values(value_heads * value_size);
    for_each_item(
        value_heads * n, [&] { return Buffer<T>(KEYS * padded_value_dim(value_dim)); },
        [&](int64_t item, Buffer<T>& scratch) {
          const int64_t h = item / n;
          pack_values(values.data() + h * value_size, value, value_dim, p.kv_len, rules[per_head ? h : 0].seen.data(),
                      b, per_head ? h / group : h, item % n, scratch.data());
        });
    // The last row blocks, the largest under a causal mask, go first. A map is computed again for every share of the
    // value heads, so there are only as many shares as keep the threads busy.
    const int64_t wanted = (4 * at::get_num_threads() + blocks - 1) / blocks;
    const int64_t shares = shared ? std::min(p.kv_heads, wanted) : p.kv_heads;
    for_each_item(
        blocks * shares, [&] { return RowBlock<T>(p, value_dim); },
        [&](int64_t item, RowBlock<T>& block) {
          const int64_t row0 = (blocks - 1 - item / shares) * ROWS, share = item % shares;
          if (shared) {
            exponentials(block, p, b, head[b], row0, keys.data());
            const T* map = normalised(block);
            for (int64_t h = share; h < p.kv_heads; h += shares) {
              times_values(block, map, values.data() + h * value_size, value_dim, output, b, row0, h * group, group);
            }
            return;
          }
          for (int64_t h = share * group; h < (share + 1) * group; ++h) {
            exponentials(block, p, b, h, row0, keys.data() + share * key_size);
            times_values(block, normalised(block), values.data() + (per_head ? h : share) * value_size, value_dim,
                         output, b, row0, h, 1);
          }
        });
  }
}

// bfloat16 stays bfloat16 where the processor multiplies it; elsewhere, and float16 always, goes through float32.
bool multiplies_bfloat16(c10::ScalarType dtype) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return dtype == at::kBFloat16 && supported && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

}  // namespace

void statistics(const Problem& p, const bool* image, float* mean, float* lse) {
  multiplies_bfloat16(p.query.dtype) ? statistics_as<BFloat16>(p, image, mean, lse)
                                     : statistics_as<float>(p, image, mean, lse);
}

void attend(const Problem& p, const Operand& value, int64_t value_dim, const int32_t* head, const Operand& output) {
  multiplies_bfloat16(p.query.dtype) ? attend_as<BFloat16>(p, value, value_dim, head, output)
                                     : attend_as<float>(p, value, value_dim, head, output);
}

}  // namespace eah::CPU_CAPABILITY
