// One query row with the map of a chosen head (decode="hold"), in one launch at the speed of memory.
//
// out_h = P_c V_h with P_c the softmax map of the chosen head c; where no head is chosen, P_h V_h. By eah_kernels/
// reference.py, shared_map_attention. The keys are split among blocks (split-KV):
//
//   1. attend_stretch: a block takes one map, one stretch of keys and up to four KV heads' values. Its warps score 128
//      keys together, then each reads values, 16 bytes a lane: of one KV head each, or of one head a part of the keys.
//      The stretch's maximum, its sum of exponentials and its unnormalised output go to scratch, in float32.
//      -- grid barrier --
//   2. combine: adds an output's stretches, in an order of their own.
//
// With a chosen head one key head is read from memory, and every value once. Stretches depend on the shape alone:
// neither the device nor the number of blocks changes a bit.

#include "tiles.cuh"

namespace eah::cuda {
namespace {

constexpr int KEYS = 32 * WARPS;
constexpr int LOADS = 8;     // of 16 bytes, that a lane has under way at once
constexpr int FEWEST = 256;  // items below which a block takes fewer values, at the price of scoring the keys again
constexpr int MOST = 512;    // items above which stretches get longer: about those that are resident at once

struct Shared {
  float scores[2][KEYS];
  float outputs[WARPS][128];
  LogSum stretches[WARPS];
  int heads[MAX_BATCH];
};

// How the work is cut. A unit is `values` KV heads with a chosen head, one query head without.
struct Plan {
  int values, stretches, stretch;

  explicit Plan(const FewRows& p) : Plan(p.batch, p.kv_heads, p.kv_len) {}
  Plan(int batch, int kv_heads, int kv_len) {
    const int tiles = (kv_len + KEYS - 1) / KEYS;
    const auto units = [&] { return batch * (kv_heads / values); };
    for (values = WARPS; values > 1 && (kv_heads % values != 0 || units() * tiles < FEWEST); values /= 2) {
    }
    const int wanted = (MOST + units() - 1) / units();
    const int tiles_a_stretch = wanted < tiles ? (tiles + wanted - 1) / wanted : 1;
    stretch = tiles_a_stretch * KEYS;
    stretches = (tiles + tiles_a_stretch - 1) / tiles_a_stretch;
  }
};

struct Arguments {
  FewRows problem;
  Plan plan;
};

// The results of the stretches of output `slot` of row b (a KV head with a chosen head, else a query head): D floats
// each, and after all of those their maximum and sum.
__device__ float* stretch_output(const FewRows& p, const Plan& plan, int b, int slot, int stretch) {
  return p.scratch + ((static_cast<int64_t>(b) * p.heads + slot) * plan.stretches + stretch) * p.dim;
}
__device__ LogSum* stretch_sum(const FewRows& p, const Plan& plan, int b, int slot, int stretch) {
  const int64_t rows = static_cast<int64_t>(p.heads) * plan.stretches;
  LogSum* const all = reinterpret_cast<LogSum*>(p.scratch + p.batch * rows * p.dim);
  return all + b * rows + static_cast<int64_t>(slot) * plan.stretches + stretch;
}

// 16 bytes as floats.
template <typename T>
struct Piece {
  static constexpr int SIZE = 16 / sizeof(T);
  float of[SIZE] = {};

  __device__ Piece() {}
  __device__ explicit Piece(const uint4& words) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < SIZE; ++i) {
      if constexpr (sizeof(T) == 4) {
        of[i] = __uint_as_float(word[i]);
      } else {
        of[i] = to_float(T{static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2))});
      }
    }
  }
};

// The map of query head `map` over one stretch times the values of `values` KV heads from value_head on; their results
// go to slots `slot` and on.
template <typename T, int D>
__device__ void attend_stretch(
    Shared& shared, const FewRows& p, const Plan& plan, int b, int map, int value_head, int values, int slot,
    int stretch) {
  constexpr int LANES = D / Piece<T>::SIZE;  // of a warp, that share a row
  constexpr int TOGETHER = 32 / LANES;       // rows of a warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = lane % LANES * Piece<T>::SIZE;
  const int part = warp / values, parts = WARPS / values;
  const int key_head = map / (p.heads / p.kv_heads), own_value = value_head + warp % values;
  const Piece<T> q(load(row_of<T>(p.query, b, map, 0) + dim, true));
  const T* const keys = row_of<T>(p.key, b, key_head, 0) + dim;
  const T* const v = row_of<T>(p.value, b, own_value, 0) + dim;
  const float scale = p.scale * LOG2E;
  Piece<T> out;
  LogSum log_sum = {-infinity(), 0};  // of the stretch so far, the same in every lane
  const int end = min(p.kv_len, (stretch + 1) * plan.stretch);

  for (int first = stretch * plan.stretch; first < end; first += KEYS) {
    float* const scores = shared.scores[first / KEYS % 2];  // two: some warps may still read the tile before
    const int own = first + 32 * warp;  // of these 32 keys the warp makes the scores
    const bool shown = own + lane < end && flag(p.mask, b, own + lane);
    const unsigned seen = __ballot_sync(EVERY_LANE, shown) >> lane / LANES;
#pragma unroll 1
    for (int row = 0; row < 32; row += LOADS * TOGETHER) {
      uint4 words[LOADS];
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int j = row + i * TOGETHER;
        words[i] = load(keys + (own + j + lane / LANES) * p.key.row, seen >> j & 1);
      }
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const int j = row + i * TOGETHER;
        const Piece<T> k(words[i]);
        float s = 0;
        for (int d = 0; d < Piece<T>::SIZE; ++d) {
          s += q.of[d] * k.of[d];
        }
        for (int bit = 1; bit < LANES; bit *= 2) {
          s += __shfl_xor_sync(EVERY_LANE, s, bit);
        }
        if (lane % LANES == 0) {
          scores[32 * warp + j + lane / LANES] = seen >> j & 1 ? s * scale : -infinity();
        }
      }
    }
    __syncthreads();

    float weight[KEYS / 32];  // of keys lane, lane + 32, ...
    LogSum here = {log_sum.max, 0};
    for (int i = 0; i < KEYS / 32; ++i) {
      weight[i] = scores[32 * i + lane];
      here.max = fmaxf(here.max, weight[i]);
    }
    for (int bit = 1; bit < 32; bit *= 2) {
      here.max = fmaxf(here.max, __shfl_xor_sync(EVERY_LANE, here.max, bit));
    }
    const float base = here.base(), shrink = exp2_approximate(log_sum.max - base);
    for (int i = 0; i < KEYS / 32; ++i) {
      weight[i] = exp2_approximate(weight[i] - base);
      here.sum += weight[i];
    }
    for (int bit = 1; bit < 32; bit *= 2) {
      here.sum += __shfl_xor_sync(EVERY_LANE, here.sum, bit);
    }
    log_sum = {here.max, log_sum.sum * shrink + here.sum};
    for (int d = 0; d < Piece<T>::SIZE; ++d) {
      out.of[d] *= shrink;
    }

#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
      if (i % parts != part) {
        continue;
      }
#pragma unroll 1
      for (int row = 0; row < 32; row += LOADS * TOGETHER) {
        uint4 words[LOADS];
        float w[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
          const int from = row + k * TOGETHER + lane / LANES;
          w[k] = __shfl_sync(EVERY_LANE, weight[i], from);
          // A hidden key weighs 0: what it holds, NaN included, is not read.
          words[k] = load(v + (first + 32 * i + from) * p.value.row, w[k] != 0);
        }
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
          const Piece<T> value(words[k]);
          for (int d = 0; d < Piece<T>::SIZE; ++d) {
            out.of[d] += w[k] * value.of[d];
          }
        }
      }
    }
  }

  for (int d = 0; d < Piece<T>::SIZE; ++d) {
    for (int bit = LANES; bit < 32; bit *= 2) {
      out.of[d] += __shfl_xor_sync(EVERY_LANE, out.of[d], bit);
    }
    if (lane < LANES) {
      shared.outputs[warp][dim + d] = out.of[d];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < values * D; i += THREADS) {
    const int value = i / D, d = i % D;
    float sum = 0;
    for (int part = 0; part < parts; ++part) {
      sum += shared.outputs[part * values + value][d];
    }
    stretch_output(p, plan, b, slot + value, stretch)[d] = sum;
  }
  if (threadIdx.x < values) {
    *stretch_sum(p, plan, b, slot + threadIdx.x, stretch) = log_sum;
  }
  // The next item writes shared.outputs after its own scores, and so after everybody has read them here.
}

// The output of a slot, written for `copies` heads from `to` on: its stretches, each by its share of the whole.
template <typename T, int D>
__device__ void combine(Shared& shared, const FewRows& p, const Plan& plan, int b, int slot, int to, int copies) {
  constexpr int LANES = D / 4, TOGETHER = 32 / LANES;  // lanes that share a stretch, stretches that a warp adds at once
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = 4 * (lane % LANES);
  LogSum all = {-infinity(), 0};
  for (int stretch = threadIdx.x; stretch < plan.stretches; stretch += THREADS) {
    all.max = fmaxf(all.max, stretch_sum(p, plan, b, slot, stretch)->max);
  }
  for (int bit = 1; bit < 32; bit *= 2) {
    all.max = fmaxf(all.max, __shfl_xor_sync(EVERY_LANE, all.max, bit));
  }
  if (lane == 0) {
    shared.stretches[warp].max = all.max;
  }
  __syncthreads();
  for (int other = 0; other < WARPS; ++other) {
    all.max = fmaxf(all.max, shared.stretches[other].max);
  }

  Piece<float> out;
#pragma unroll 8
  for (int stretch = warp * TOGETHER + lane / LANES; stretch < plan.stretches; stretch += WARPS * TOGETHER) {
    const LogSum part = *stretch_sum(p, plan, b, slot, stretch);
    const Piece<float> piece(*reinterpret_cast<const uint4*>(stretch_output(p, plan, b, slot, stretch) + dim));
    const float share = exp2_approximate(part.max - all.base());
    all.sum += part.sum * share;
    for (int d = 0; d < 4; ++d) {
      out.of[d] += piece.of[d] * share;
    }
  }
  for (int bit = LANES; bit < 32; bit *= 2) {
    all.sum += __shfl_xor_sync(EVERY_LANE, all.sum, bit);
    for (int d = 0; d < 4; ++d) {
      out.of[d] += __shfl_xor_sync(EVERY_LANE, out.of[d], bit);
    }
  }
  if (lane == 0) {
    shared.stretches[warp].sum = all.sum;
  }
  if (lane < LANES) {
    for (int d = 0; d < 4; ++d) {
      shared.outputs[warp][dim + d] = out.of[d];
    }
  }
  __syncthreads();
  const int d = threadIdx.x;
  if (d < D) {
    float total = 0, sum = 0;
    for (int other = 0; other < WARPS; ++other) {
      total += shared.outputs[other][d];
      sum += shared.stretches[other].sum;
    }
    for (int copy = 0; copy < copies; ++copy) {
      store(row_of<T>(p.output, b, to + copy, 0) + d, sum == 0 ? 0 : total / sum);
    }
  }
  // The next item writes what is read here after its own first barrier, and so after everybody has read it.
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 4) few_rows_kernel(const Arguments arguments) {
  Shared& shared = shared_memory<Shared>();
  const FewRows& p = arguments.problem;
  const Plan& plan = arguments.plan;
  const int group = p.heads / p.kv_heads;
  for (int b = threadIdx.x; b < p.batch; b += THREADS) {
    shared.heads[b] = p.head[b];
  }
  __syncthreads();

  const Work units = {shared.heads, p.batch, p.kv_heads / plan.values, p.heads};
  const int64_t items = static_cast<int64_t>(units.total()) * plan.stretches;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int stretch = static_cast<int>(item % plan.stretches);
    int unit = static_cast<int>(item / plan.stretches);
    const int b = units.row(unit), chosen = shared.heads[b], values = chosen >= 0 ? plan.values : 1;
    const int map = chosen >= 0 ? chosen : unit, slot = unit * values;
    attend_stretch<T, D>(shared, p, plan, b, map, chosen >= 0 ? slot : unit / group, values, slot, stretch);
  }
  grid_barrier();

  const Work slots = {shared.heads, p.batch, p.kv_heads, p.heads};
  const int outputs = slots.total();
  for (int item = blockIdx.x; item < outputs; item += gridDim.x) {
    int slot = item;
    const int b = slots.row(slot), copies = shared.heads[b] >= 0 ? group : 1;
    combine<T, D>(shared, p, plan, b, slot, slot * copies, copies);
  }
}

template <typename T>
const char* launch(const FewRows& p, void* stream) {
  const Arguments arguments = {p, Plan(p)};
  const int64_t most = static_cast<int64_t>(p.batch) * p.heads * arguments.plan.stretches;
  if (p.dim == 64) {
    return launch_cooperative(few_rows_kernel<T, 64>, most, THREADS, sizeof(Shared), arguments, stream);
  }
  return launch_cooperative(few_rows_kernel<T, 128>, most, THREADS, sizeof(Shared), arguments, stream);
}

}  // namespace

int64_t few_rows_scratch(int batch, int heads, int kv_heads, int kv_len, int dim) {
  return static_cast<int64_t>(batch) * heads * Plan(batch, kv_heads, kv_len).stretches * (dim + 2);
}

const char* few_rows(const FewRows& p, void* stream) {
  if (p.kv_len < 1 || p.batch < 1 || p.batch > MAX_BATCH || (p.dim != 64 && p.dim != 128)) {
    return "the problem is outside of what the kernel takes";
  }
  switch (p.dtype) {
    case Dtype::Half: return launch<Half>(p, stream);
    case Dtype::BFloat16: return launch<BFloat16>(p, stream);
    default: return launch<float>(p, stream);
  }
}

}  // namespace eah::cuda
