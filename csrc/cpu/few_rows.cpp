// EAH of a few query rows on many keys, as in decoding, at the speed of memory. Compiled once per CPU capability.
//
// Nothing is packed: keys and values are read once, where they lie, 64 at a time, for all rows and for all maps that
// share a KV head. The work is cut into KV heads by stretches of keys, whose sums and outputs are added in their order,
// so the number of threads changes no bit. Products, maps and sums are float32 whatever the dtype.

#include "few_rows.h"

#include "products.h"
#include "scores.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

namespace eah::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t STRETCH = 4;  // tiles of keys: a constant, so that sums keep their order

// A tile of rows in float32, and what else a thread needs for a tile.
struct Scratch {
  Buffer<float> copy, rows;
};

// Softmax maps of the rows for `heads` query heads of batch row b from first_head on. Of each stretch of keys the
// weights are exp(score - the stretch's maximum); times the row's share of that stretch they are probabilities.
class Maps {
 public:
  const Problem& p;
  const int64_t b, first_head, heads;
  const std::vector<Visibility>& rules;  // one for each head, or one for all
  int64_t first_tile, tiles, stretches;

  Maps(const Problem& p, int64_t b, int64_t first_head, int64_t heads, const std::vector<Visibility>& rules)
      : p(p),
        b(b),
        first_head(first_head),
        heads(heads),
        rules(rules),
        first_tile(span_of(p, 0).first / KEYS),
        tiles(CPU_CAPABILITY::tiles(p.kv_len) - first_tile),
        stretches(std::max<int64_t>(1, (tiles + STRETCH - 1) / STRETCH)),
        query_(heads * p.q_len * whole_vectors(p.dim)),
        weight_(tiles * heads * p.q_len * KEYS),
        max_(stretches * heads * p.q_len),
        sum_(stretches * heads * p.q_len) {
    for (int64_t map = 0; map < heads; ++map) {
      load(query_.data() + map * p.q_len * whole_vectors(p.dim), whole_vectors(p.dim), p.query, p.dtype, b,
           first_head + map, 0, p.q_len, p.dim);
    }
  }

  // Fills in the maps. Heads that share keys take them together; the thread that does the last stretch of such heads
  // finds their shares, writes row log-sum-exps to lse (heads, rows) unless it is null, and calls finished(map).
  template <typename Finished>
  void make(float* lse, const Finished& finished) {
    const int64_t together = std::min(p.heads / p.kv_heads, heads), rows = together * p.q_len;
    const int64_t units = heads / together;
    Countdown left(units, stretches);
    for_each_item(
        stretches * units,
        [&] { return Scratch{Buffer<float>(KEYS * whole_vectors(p.dim)), Buffer<float>(rows * Vec::size())}; },
        [&](int64_t item, const Scratch& scratch) {
          const int64_t unit = item % units, first_map = unit * together;
          make_weights(item / units, first_map, together, scratch);
          if (left.last_of(unit)) {
            for (int64_t map = first_map; map < first_map + together; ++map) {
              find_shares(map, lse);
              finished(map);
            }
          }
        });
  }

  int64_t end_of(int64_t stretch) const {
    return std::min((stretch + 1) * STRETCH, tiles);
  }

  // Weights (rows, 64) of a map; those of maps that follow each other lie side by side. Tiles count from first_tile on.
  float* weights(int64_t tile, int64_t map) const {
    return weight_.data() + (tile * heads + map) * p.q_len * KEYS;
  }

  // (rows,)
  const float* shares(int64_t stretch, int64_t map) const {
    return of(max_, stretch, map);
  }

  int64_t first_key(int64_t tile) const {
    return (first_tile + tile) * KEYS;
  }

  int64_t keys_of(int64_t tile) const {
    return std::min(KEYS, p.kv_len - first_key(tile));
  }

  const Visibility& rule(int64_t map) const {
    return rules[rules.size() > 1 ? map : 0];
  }

  // Whether some row of maps first..end sees a key of the tile.
  bool sees(int64_t first, int64_t end, int64_t tile) const {
    for (int64_t map = first; map < (rules.size() > 1 ? end : first + 1); ++map) {
      if (std::memchr(rule(map).seen.data() + first_key(tile), 1, keys_of(tile))) {
        return true;
      }
    }
    return false;
  }

  // A tile of a map, written to and returned as `to`, (rows, 64).
  const float* probabilities(int64_t tile, int64_t map, float* to) const {
    const float *weight = weights(tile, map), *share = shares(tile / STRETCH, map);
    for (int64_t r = 0; r < p.q_len; ++r) {
      for (int64_t j = 0; j < KEYS; j += Vec::size()) {
        (Vec::loadu(weight + r * KEYS + j) * Vec(share[r])).store(to + r * KEYS + j);
      }
    }
    return to;
  }

 private:
  Buffer<float> query_, weight_;
  Buffer<float> max_, sum_;  // (stretches, heads, rows); the maxima become the shares

  float* of(const Buffer<float>& rows, int64_t stretch, int64_t map) const {
    return rows.data() + (stretch * heads + map) * p.q_len;
  }

  void make_weights(int64_t stretch, int64_t first_map, int64_t together, const Scratch& scratch) {
    const int64_t rows = together * p.q_len, first = stretch * STRETCH, end = end_of(stretch);
    float *lanes = scratch.rows.data(), *max = of(max_, stretch, first_map), *sum = of(sum_, stretch, first_map);
    std::fill_n(lanes, rows * Vec::size(), -INF);
    for (int64_t tile = first; tile < end; ++tile) {
      make_scores(tile, first_map, together, scratch);
    }
    for (int64_t r = 0; r < rows; ++r) {
      max[r] = largest(lanes + r * Vec::size());
    }
    std::fill_n(lanes, rows * Vec::size(), 0.f);
    for (int64_t tile = first; tile < end; ++tile) {
      exponentials(weights(tile, first_map), lanes, max, rows);
    }
    for (int64_t r = 0; r < rows; ++r) {
      sum[r] = total(Vec::loadu(lanes + r * Vec::size()));
    }
  }

  // From each stretch's maximum and sum.
  void find_shares(int64_t map, float* lse) {
    for (int64_t r = 0; r < p.q_len; ++r) {
      float max = -INF, sum = 0;
      for (int64_t stretch = 0; stretch < stretches; ++stretch) {
        const float here = of(max_, stretch, map)[r];
        max = std::isnan(max) || max > here ? max : here;
      }
      const float base = max == -INF ? 0.f : max;
      for (int64_t stretch = 0; stretch < stretches; ++stretch) {
        float& share = of(max_, stretch, map)[r];
        share = std::exp(share - base);
        sum += share * of(sum_, stretch, map)[r];
      }
      for (int64_t stretch = 0; stretch < stretches; ++stretch) {
        float& share = of(max_, stretch, map)[r];
        share = max == -INF ? 0.f : share / sum;
      }
      if (lse) {
        lse[map * p.q_len + r] = max == -INF ? -INF : max + std::log(sum);
      }
    }
  }

  void make_scores(int64_t tile, int64_t first_map, int64_t together, const Scratch& scratch) {
    const int64_t head = first_head + first_map, dim = whole_vectors(p.dim), tile_size = p.q_len * KEYS;
    float* score = weights(tile, first_map);
    if (!sees(first_map, first_map + together, tile)) {
      std::fill_n(score, together * tile_size, -INF);
      return;
    }
    with_rows(p, p.key, b, head / (p.heads / p.kv_heads), first_key(tile), keys_of(tile), p.dim, scratch.copy.data(),
              [&](const auto* keys, int64_t stride) {
                multiply_keys(score, query_.data() + first_map * p.q_len * dim, together * p.q_len, keys, stride,
                              keys_of(tile), dim);
              });
    for (int64_t map = 0; map < together; ++map) {
      finish_scores(score + map * tile_size, scratch.rows.data() + map * p.q_len * Vec::size(), p, b, head + map, 0,
                    p.q_len, first_tile + tile);
    }
  }
};

// The column means of a head, into zeros.
void column_means(const Maps& maps, int64_t head, const bool* image, Span span, float* mean) {
  const Problem& p = maps.p;
  const Visibility& rule = maps.rule(head);
  const int64_t end = std::min(maps.tiles, tiles(span.last) - maps.first_tile);
  for (int64_t tile = std::max<int64_t>(0, span.first / KEYS - maps.first_tile); tile < end; ++tile) {
    const int64_t first = maps.first_key(tile);
    const Span keys = {std::max(first, span.first), std::min(first + KEYS, span.last)};
    const float *weights = maps.weights(tile, head), *shares = maps.shares(tile / STRETCH, head);
    for (int64_t r = 0; r < p.q_len; ++r, weights += KEYS) {
      const int64_t own = r + p.kv_len - p.q_len;
      if (!rule.counting[r]) {
        continue;
      }
      for (int64_t j = keys.first; j < keys.last; ++j) {
        mean[j] += j == own ? 0.f : weights[j - first] * shares[r];
      }
    }
  }
  for (int64_t j = span.first; j < span.last; ++j) {
    mean[j] = image[j] && rule.seen_by[j] > 0 ? mean[j] / static_cast<float>(rule.seen_by[j]) : 0.f;
  }
}

// What a stretch of keys adds to the outputs of maps that share a KV head: (together, rows, ld) from `output` on.
void add_stretch(float* output, const Maps& maps, int64_t stretch, int64_t first_map, int64_t together,
                 const Values& values, int64_t kv_head, const Scratch& scratch) {
  const Problem& p = maps.p;
  const int64_t rows = p.q_len, ld = whole_vectors(values.dim);
  std::fill_n(output, together * rows * ld, 0.f);
  for (int64_t tile = stretch * STRETCH; tile < maps.end_of(stretch); ++tile) {
    if (!maps.sees(first_map, first_map + together, tile)) {
      continue;
    }
    const int64_t first = maps.first_key(tile), n = maps.keys_of(tile);
    with_rows(p, values.view, maps.b, kv_head, first, n, values.dim, scratch.copy.data(),
              [&](const auto* from, int64_t stride) {
                for (int64_t map = first_map; map < first_map + together; ++map) {
                  const float* map_rows = maps.probabilities(tile, map, scratch.rows.data());
                  float* to = output + (map - first_map) * rows * ld;
                  add_values(to, ld, map_rows, rows, from, stride, maps.rule(map).seen.data() + first, n);
                }
              });
  }
}

}  // namespace

void few_rows_statistics(const Problem& p, int64_t b, const bool* image, float* mean, float* lse) {
  const Span span = image_span(image, p.kv_len);
  const std::vector<Visibility> rules = visibilities(p, b, 0, p.heads);
  Maps maps(p, b, 0, p.heads, rules);
  maps.make(lse, [&](int64_t h) { column_means(maps, h, image, span, mean + h * p.kv_len); });
}

void few_rows_attend(const Problem& p, int64_t b, const Values& values, int64_t head, const View& output) {
  const int64_t group = p.heads / p.kv_heads, ld = whole_vectors(values.dim), size = p.q_len * ld;
  const bool shared = head >= 0;
  // With a chosen head an output for each KV head, written for all of its query heads; else one for each of those.
  const int64_t together = shared ? 1 : group, copies = shared ? group : 1;
  const int64_t outputs = p.kv_heads * together;
  const int64_t first_head = shared ? head : 0, heads = shared ? 1 : p.heads;
  const std::vector<Visibility> rules = visibilities(p, b, first_head, heads);
  Maps maps(p, b, first_head, heads, rules);
  maps.make(nullptr, [](int64_t) {});
  const Buffer<float> parts(maps.stretches * outputs * size);
  Countdown left(p.kv_heads, maps.stretches);
  for_each_item(
      maps.stretches * p.kv_heads,
      [&] { return Scratch{Buffer<float>(KEYS * ld), Buffer<float>(p.q_len * KEYS)}; },
      [&](int64_t item, const Scratch& scratch) {
        const int64_t stretch = item / p.kv_heads, kv_head = item % p.kv_heads;
        float* part = parts.data() + (stretch * outputs + kv_head * together) * size;
        const int64_t first_map = shared ? 0 : kv_head * group;
        add_stretch(part, maps, stretch, first_map, together, values, kv_head, scratch);
        if (!left.last_of(kv_head)) {
          return;
        }
        for (int64_t first = kv_head * together; first < (kv_head + 1) * together; ++first) {
          float* sum = parts.data() + first * size;
          for (int64_t other = 1; other < maps.stretches; ++other) {
            const float* more = parts.data() + (other * outputs + first) * size;
            std::transform(more, more + size, sum, sum, std::plus<float>());
          }
          for (int64_t h = first * copies; h < (first + 1) * copies; ++h) {
            store(output, p.dtype, b, h, 0, p.q_len, sum, ld, values.dim);
          }
        }
      });
}

}  // namespace eah::cpu::CPU_CAPABILITY
