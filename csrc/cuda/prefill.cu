// EAH at prefill in one launch, for prompts so short that several launches cost more than their arithmetic.
//
// What is computed is eah_kernels/reference.py's: per query head the softmax map of causal attention with a key
// mask; per image column its mean over the rows that count, its own row left out; per head the columns above the
// threshold; per batch row the head with the most; and the output of that head's map, or of each head's own.
//
//   1. row_statistics: per 64 rows of a head, two walks over the keys. The first takes the row log-sum-exps, which stay
//      in registers; the second sums the normalised map over the 64 rows, for tiles that hold image columns.
//      -- grid barrier --
//   2. count_sinks: adds the sums of a column in the order of the row blocks, and counts with integers.
//      -- grid barrier --
//   3. choose_heads: every block, for itself, from the counts.
//   4. attend: FlashAttention's online softmax per 64 rows, with the chosen head's query and key for each KV head's
//      values, written once per query head of the group.
//
// A warp owns 16 rows; tiles are 64 keys. Products are mma.sync on 16-bit operands accumulated in float32, statistics
// are float32, and no sum depends on the number of blocks or on their order.

#include "prefill_tiles.cuh"

namespace eah::cuda {
namespace {

// Where the sums of 64 rows of a head begin, one float per key, padded to whole tiles.
__device__ float* row_block_sums(const Prefill& p, int b, int h, int block) {
  const int64_t blocks = (p.q_len + ROWS - 1) / ROWS;
  return p.scratch + ((static_cast<int64_t>(b) * p.heads + h) * blocks + block) * blocks * KEYS;
}

// A tile that row_statistics looks at: first each for the log-sum-exps, then those with image columns for their sums.
struct Visit {
  int tile;  // -1: none is left
  bool sums;

  __device__ Visit next(int last_tile, uint32_t image_tiles) const {
    if (!sums && tile < last_tile) {
      return {tile + 1, false};
    }
    return {__ffs(sums ? image_tiles >> tile >> 1 << tile << 1 : image_tiles) - 1, true};
  }
};

template <typename T, int D>
__device__ void row_statistics(Shared<T, D>& shared, const Prefill& p, int b, int h, int block) {
  const Lane at;
  uint32_t image_tiles = 0;
  for (int tile = 0; tile <= block; ++tile) {
    image_tiles |= (bits(shared.image, tile) != 0) << tile;
  }
  if (image_tiles == 0) {
    return;
  }
  const uint64_t rows = bits(shared.seen, block);
  const int kv_head = h / (p.heads / p.kv_heads);
  const float scale = p.scale * LOG2E;
  float* const sums = row_block_sums(p, b, h, block);

  load_tile<T, D>(shared.query, p.query, b, h, block, existing(p, block));
  load_tile<T, D>(shared.tiles[0], p.key, b, kv_head, 0, bits(shared.seen, 0));
  uint32_t q[D / 16][4];
  LogSum log_sum[2] = {{-infinity(), 0}, {-infinity(), 0}};  // of this thread's columns, rows `row` and `row` + 8
  float log_sum_exp[2] = {0, 0};
  int buffer = 0;
  for (Visit now = {0, false}, then; now.tile >= 0; now = then, buffer ^= 1) {
    then = now.next(block, image_tiles);
    wait_for_copies();
    __syncthreads();  // this tile is there, and the other buffer is no longer read
    if (then.tile >= 0) {
      load_tile<T, D>(shared.tiles[buffer ^ 1], p.key, b, kv_head, then.tile, bits(shared.seen, then.tile));
    }
    if (now.tile == 0 && !now.sums) {
      read_query<T, D>(q, shared.query);
    }
    float s[KEYS / 8][4];
    score<T, D>(s, q, shared.tiles[buffer], scale);
    const uint64_t seen = bits(shared.seen, now.tile);
    if (now.tile == block || (seen & rows) != ~0ull) {
      hide(s, seen, rows, now.tile == block, now.sums);
    }

    if (!now.sums) {
      for (int half = 0; half < 2; ++half) {
        LogSum here = {-infinity(), 0};
        for (int n = 0; n < KEYS / 8; ++n) {
          here.max = fmaxf(here.max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        }
        here.max = fmaxf(here.max, log_sum[half].max);
        const float base = here.base();
        for (int n = 0; n < KEYS / 8; ++n) {
          here.sum += exp2_approximate(s[n][2 * half] - base) + exp2_approximate(s[n][2 * half + 1] - base);
        }
        here.sum += log_sum[half].sum * exp2_approximate(log_sum[half].max - base);
        log_sum[half] = here;
      }
      if (then.sums) {
        for (int half = 0; half < 2; ++half) {
          for (int bit = 1; bit < 4; bit *= 2) {
            LogSum other = log_sum[half];
            other.max = __shfl_xor_sync(EVERY_LANE, other.max, bit);
            other.sum = __shfl_xor_sync(EVERY_LANE, other.sum, bit);
            log_sum[half].merge(other);
          }
          // A row that sees nothing does not count either: its scores are hidden, and any finite number will do.
          log_sum_exp[half] = log_sum[half].sum == 0 ? 0 : log_sum[half].max + log2f(log_sum[half].sum);
        }
      }
      continue;
    }

    float columns[16];  // columns 8 n + column + i of the tile
    for (int n = 0; n < KEYS / 8; ++n) {
      for (int i = 0; i < 2; ++i) {
        columns[2 * n + i] =
            exp2_approximate(s[n][i] - log_sum_exp[0]) + exp2_approximate(s[n][2 + i] - log_sum_exp[1]);
      }
    }
    const float2 pair = sum_over_rows(columns, at.lane);
    const int first = 8 * (kept_values(at.lane) / 2) + at.column;
    shared.sums[at.warp][first] = pair.x;
    shared.sums[at.warp][first + 1] = pair.y;
    __syncthreads();
    if (threadIdx.x < KEYS) {
      float sum = 0;
      for (int warp = 0; warp < WARPS; ++warp) {
        sum += shared.sums[warp][threadIdx.x];
      }
      sums[now.tile * KEYS + threadIdx.x] = sum;
    }
  }
}

// The sinks among 128 columns, one a thread, added to the head's count.
template <typename T, int D>
__device__ void count_sinks(const Shared<T, D>& shared, const Prefill& p, int b, int h, int first) {
  const int column = first + threadIdx.x, tile = column / KEYS, tiles = (p.q_len + KEYS - 1) / KEYS;
  bool sink = false;
  if (column < p.q_len && (bits(shared.image, tile) & bits(shared.seen, tile)) >> (column % KEYS) & 1) {
    int rows = __popcll(bits(shared.seen, tile) >> (column % KEYS) >> 1);
    float sum = 0, sums[MAX_TILES];
#pragma unroll
    for (int block = 0; block < MAX_TILES; ++block) {
      const bool below = block >= tile && block < tiles;
      sums[block] = below ? row_block_sums(p, b, h, block)[column] : 0;
      rows += below && block > tile ? __popcll(bits(shared.seen, block)) : 0;
    }
#pragma unroll
    for (int block = 0; block < MAX_TILES; ++block) {
      sum += sums[block];
    }
    sink = rows > 0 && sum / static_cast<float>(rows) > p.threshold;
  }
  const int sinks = __popc(__ballot_sync(EVERY_LANE, sink));
  if (threadIdx.x % 32 == 0 && sinks > 0) {
    atomicAdd(p.counts + b * p.heads + h, sinks);
  }
}

// Into shared.heads, for each batch row: the head with the most sinks, the lowest on a tie; -1 without a sink, or below
// min_density of the row's image tokens.
template <typename T, int D>
__device__ void choose_heads(Shared<T, D>& shared, const Prefill& p) {
  const Lane at;
  for (int b = at.warp; b < p.batch; b += WARPS) {
    int most = 0, chosen = -1, tokens = 0;
    for (int h = at.lane; h < p.heads; h += 32) {
      const int count = p.counts[b * p.heads + h];
      if (count > most) {
        most = count;
        chosen = h;
      }
    }
    for (int j = at.lane; p.min_density > 0 && j < p.q_len; j += 32) {
      tokens += flag(p.image, b, j);
    }
    for (int bit = 1; bit < 32; bit *= 2) {
      const int other_most = __shfl_xor_sync(EVERY_LANE, most, bit);
      const int other = __shfl_xor_sync(EVERY_LANE, chosen, bit);
      tokens += __shfl_xor_sync(EVERY_LANE, tokens, bit);
      if (other_most > most || (other_most == most && other_most > 0 && other < chosen)) {
        most = other_most;
        chosen = other;
      }
    }
    if (chosen >= 0 && p.min_density > 0 && static_cast<float>(most) / static_cast<float>(tokens) < p.min_density) {
      chosen = -1;
    }
    if (at.lane == 0) {
      shared.heads[b] = chosen;
      if (blockIdx.x == 0) {
        p.head[b] = chosen;
      }
    }
  }
  __syncthreads();
}

// 64 rows of the map of query head `map` times the values of `kv_head`, written for `copies` heads from `to` on.
template <typename T, int D>
__device__ void attend(
    Shared<T, D>& shared, const Prefill& p, int b, int map, int kv_head, int to, int copies, int block) {
  const Lane at;
  T *const keys = shared.tiles[0], *const values = shared.tiles[1];
  const int map_kv_head = map / (p.heads / p.kv_heads);
  const float scale = p.scale * LOG2E;
  load_tile<T, D>(shared.query, p.query, b, map, block, existing(p, block));
  load_tile<T, D>(keys, p.key, b, map_kv_head, 0, bits(shared.seen, 0));
  uint32_t q[D / 16][4];
  float out[D / 8][4] = {};
  LogSum log_sum[2] = {{-infinity(), 0}, {-infinity(), 0}};  // max of the row, sum of this thread's columns
  for (int tile = 0; tile <= block; ++tile) {
    const uint64_t seen = bits(shared.seen, tile);
    wait_for_copies();
    __syncthreads();  // the keys are there, and the values of the tile before are no longer read
    load_tile<T, D>(values, p.value, b, kv_head, tile, seen);
    if (tile == 0) {
      read_query<T, D>(q, shared.query);
    }
    float s[KEYS / 8][4];
    score<T, D>(s, q, keys, scale);
    if (tile == block || seen != ~0ull) {
      hide(s, seen, ~0ull, tile == block, false);
    }
    for (int half = 0; half < 2; ++half) {
      float max = log_sum[half].max;
      for (int n = 0; n < KEYS / 8; ++n) {
        max = fmaxf(max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      }
      max = fmaxf(max, __shfl_xor_sync(EVERY_LANE, max, 1));
      max = fmaxf(max, __shfl_xor_sync(EVERY_LANE, max, 2));
      const LogSum before = log_sum[half];
      log_sum[half].max = max;
      const float base = log_sum[half].base(), shrink = exp2_approximate(before.max - base);
      log_sum[half].sum = before.sum * shrink;
      for (int n = 0; n < KEYS / 8; ++n) {
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_approximate(s[n][i] - base);
          log_sum[half].sum += s[n][i];
        }
      }
      for (int n = 0; n < D / 8; ++n) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
      }
    }
    wait_for_copies();
    __syncthreads();  // the values are there, and the keys are no longer read
    if (tile < block) {
      load_tile<T, D>(keys, p.key, b, map_kv_head, tile + 1, bits(shared.seen, tile + 1));
    }
    for (int k = 0; k < KEYS / 16; ++k) {
      const uint32_t a[4] = {
          pack<T>(s[2 * k][0], s[2 * k][1]), pack<T>(s[2 * k][2], s[2 * k][3]),
          pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, values + place<D>(16 * k + at.lane % 16, n + at.lane / 16));
        multiply_add<T>(out[n], a, v[0], v[1]);
        multiply_add<T>(out[n + 1], a, v[2], v[3]);
      }
    }
  }

  // Through shared memory, where a warp touches its own rows alone, to 16-byte stores.
  uint32_t* const staged = reinterpret_cast<uint32_t*>(shared.query);
  for (int half = 0; half < 2; ++half) {
    float sum = log_sum[half].sum;
    sum += __shfl_xor_sync(EVERY_LANE, sum, 1);
    sum += __shfl_xor_sync(EVERY_LANE, sum, 2);
    const float inverse = sum == 0 ? 0 : 1 / sum;  // a row that sees no key is 0
    const int row = 16 * at.warp + at.row + 8 * half;
    for (int n = 0; n < D / 8; ++n) {
      staged[(place<D>(row, n) + at.column) / 2] =
          pack<T>(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
    }
  }
  __syncwarp();
  constexpr int CHUNKS = D / 8;
  for (int i = 0; i < CHUNKS / 2; ++i) {
    const int row = 16 * at.warp + (32 * i + at.lane) / CHUNKS, chunk = at.lane % CHUNKS;
    if (block * ROWS + row < p.q_len) {
      const uint4 eight = *reinterpret_cast<const uint4*>(shared.query + place<D>(row, chunk));
      for (int copy = 0; copy < copies; ++copy) {
        T* const into = row_of<T>(p.output, b, to + copy, block * ROWS + row);
        *reinterpret_cast<uint4*>(into + 8 * chunk) = eight;
      }
    }
  }
}

// Item `round` of a block: the first round in the order of the blocks, the next backwards, and so on, so that of items
// in the order of falling cost every block gets a like share. May lie beyond the last item.
__device__ int64_t item_of(int64_t round) {
  const int64_t blocks = gridDim.x, block = blockIdx.x;
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, D == 128 ? 2 : 3) prefill_kernel(const Prefill p) {
  Shared<T, D>& shared = shared_memory<Shared<T, D>>();
  const int blocks = (p.q_len + ROWS - 1) / ROWS, group = p.heads / p.kv_heads;
  int held = -1;  // the batch row whose flags are in shared memory

  for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.batch * p.heads; i += gridDim.x * THREADS) {
    p.counts[i] = 0;
  }
  // Items of all phases in the order of falling cost: the last row block first.
  const int64_t row_blocks = static_cast<int64_t>(blocks) * p.batch * p.heads;
  for (int64_t round = 0; round * gridDim.x < row_blocks; ++round) {
    const int64_t item = item_of(round);
    if (item < row_blocks) {
      const int row = static_cast<int>(item % (p.batch * p.heads));
      begin(shared, p, row / p.heads, held);
      const int block = blocks - 1 - static_cast<int>(item / (p.batch * p.heads));
      row_statistics(shared, p, row / p.heads, row % p.heads, block);
    }
  }
  grid_barrier();

  const int parts = (p.q_len + THREADS - 1) / THREADS;
  for (int64_t item = blockIdx.x; item < static_cast<int64_t>(parts) * p.batch * p.heads; item += gridDim.x) {
    const int row = static_cast<int>(item / parts);
    begin(shared, p, row / p.heads, held);
    count_sinks(shared, p, row / p.heads, row % p.heads, static_cast<int>(item % parts) * THREADS);
  }
  grid_barrier();

  choose_heads(shared, p);
  const Work work = {shared.heads, p.batch, p.kv_heads, p.heads};
  const int64_t a_block = work.total(), outputs = a_block * blocks;
  for (int64_t round = 0; round * gridDim.x < outputs; ++round) {
    const int64_t item = item_of(round);
    if (item < outputs) {
      int index = static_cast<int>(item % a_block);
      const int b = work.row(index), chosen = shared.heads[b], block = blocks - 1 - static_cast<int>(item / a_block);
      begin(shared, p, b, held);
      const int map = chosen >= 0 ? chosen : index, kv_head = chosen >= 0 ? index : index / group;
      const int copies = chosen >= 0 ? group : 1;
      attend(shared, p, b, map, kv_head, index * copies, copies, block);
    }
  }
}

template <typename T>
const char* launch(const Prefill& p, void* stream) {
  const int64_t items = static_cast<int64_t>((p.q_len + ROWS - 1) / ROWS) * p.batch * p.heads;
  if (p.dim == 64) {
    return launch_cooperative(prefill_kernel<T, 64>, items, THREADS, sizeof(Shared<T, 64>), p, stream);
  }
  return launch_cooperative(prefill_kernel<T, 128>, items, THREADS, sizeof(Shared<T, 128>), p, stream);
}

}  // namespace

int64_t prefill_scratch(int batch, int heads, int q_len) {
  const int64_t blocks = (q_len + ROWS - 1) / ROWS;
  return batch * heads * blocks * blocks * KEYS;
}

const char* prefill(const Prefill& p, void* stream) {
  if (p.q_len < 1 || p.q_len > MAX_PREFILL || p.batch < 1 || p.batch > MAX_BATCH || (p.dim != 64 && p.dim != 128)) {
    return "the problem is outside of what the kernel takes";
  }
  return p.dtype == Dtype::Half ? launch<Half>(p, stream) : launch<BFloat16>(p, stream);
}

}  // namespace eah::cuda
