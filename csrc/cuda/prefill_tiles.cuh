// The parts of prefill.cu that know how a tile lies in memory and in registers: 64 rows of a query, key or value head,
// and 64 x 64 scores, of which a warp owns 16 rows.
#pragma once

#include "tiles.cuh"

namespace eah::cuda {
namespace {

constexpr int ROWS = 16 * WARPS;
constexpr int KEYS = 64;
constexpr int MAX_TILES = MAX_PREFILL / KEYS;

static_assert(ROWS == KEYS, "tile t's rows are tile t's keys: the diagonal is in tile t of row block t");

template <typename T, int D>
struct Shared {
  T query[ROWS * D];  // afterwards each warp's part stages its output
  T tiles[2][KEYS * D];
  uint32_t seen[2 * MAX_TILES];  // bit j: key j exists and the mask shows it. Row j counts then: it sees its own key
  uint32_t image[2 * MAX_TILES];
  float sums[WARPS][KEYS];
  int heads[MAX_BATCH];
};

// A thread's place in the fragments of mma.m16n8k16: of an accumulator c, c[0..1] are row `row`, c[2..3] row `row` + 8
// of the warp's 16, columns `column` and `column` + 1 of each 8.
struct Lane {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = 2 * (lane % 4);
};

// Where 8 elements (16 bytes) of a tile's row lie: exclusive-or keeps 8 rows of one chunk on different banks.
template <int D>
__device__ int place(int row, int chunk) {
  return row * D + (chunk ^ (row % 8)) * 8;
}

// The bits of tile `tile`.
__device__ uint64_t bits(const uint32_t* words, int tile) {
  return words[2 * tile] | static_cast<uint64_t>(words[2 * tile + 1]) << 32;
}

// Before an item of batch row b: synchronises the block, and reads the row's flags unless they are `held`.
template <typename T, int D>
__device__ void begin(Shared<T, D>& shared, const Prefill& p, int b, int& held) {
  const Lane at;
  __syncthreads();
  if (b == held) {
    return;
  }
  held = b;
  constexpr int WORDS = 2 * MAX_TILES / WARPS;  // of a warp
  bool image[WORDS], seen[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const int j = min(32 * (at.warp + WARPS * i) + at.lane, p.q_len - 1);  // no branch: all are read at once
    image[i] = flag(p.image, b, j);
    seen[i] = flag(p.mask, b, j);
  }
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const int word = at.warp + WARPS * i;
    const bool exists = 32 * word + at.lane < p.q_len;
    const unsigned image_bits = __ballot_sync(EVERY_LANE, exists && image[i]);
    const unsigned seen_bits = __ballot_sync(EVERY_LANE, exists && seen[i]);
    if (at.lane == 0) {
      shared.image[word] = image_bits;
      shared.seen[word] = seen_bits;
    }
  }
  __syncthreads();
}

// Starts the copy of rows 64 * tile and on, zeros for those whose bit in `wanted` is not set.
template <typename T, int D>
__device__ void load_tile(T* to, const View& x, int b, int h, int tile, uint64_t wanted) {
  constexpr int CHUNKS = D / 8, TOGETHER = THREADS / CHUNKS;  // rows that the block copies at once
  const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  const T* from = row_of<T>(x, b, h, static_cast<int64_t>(tile) * KEYS + first) + 8 * chunk;
#pragma unroll 2
  for (int row = first; row < first + KEYS; row += TOGETHER, from += TOGETHER * x.row) {
    copy_async(to + place<D>(row, chunk), from, wanted >> row & 1);
  }
}

// The rows of tile `tile` that exist.
__device__ uint64_t existing(const Prefill& p, int tile) {
  const int rows = p.q_len - tile * ROWS;
  return rows >= ROWS ? ~0ull : (1ull << rows) - 1;
}

// A warp's 16 rows of the query tile as left operands.
template <typename T, int D>
__device__ void read_query(uint32_t (&q)[D / 16][4], const T* tile) {
  const Lane at;
  for (int k = 0; k < D / 16; ++k) {
    load_matrices(q[k], tile + place<D>(16 * at.warp + at.lane % 16, 2 * k + at.lane / 16));
  }
}

// s (16 x 64) = scale * q k^T.
template <typename T, int D>
__device__ void score(float (&s)[KEYS / 8][4], const uint32_t (&q)[D / 16][4], const T* keys, float scale) {
  const Lane at;
  for (int n = 0; n < KEYS / 8; n += 2) {
    for (int i = 0; i < 4; ++i) {
      s[n][i] = s[n + 1][i] = 0;
    }
    for (int k = 0; k < D / 16; ++k) {
      uint32_t b[4];
      const int row = 8 * n + at.lane % 8 + at.lane / 16 * 8;
      load_matrices(b, keys + place<D>(row, 2 * k + at.lane / 8 % 2));
      multiply_add<T>(s[n], q[k], b[0], b[1]);
      multiply_add<T>(s[n + 1], q[k], b[2], b[3]);
    }
    for (int i = 0; i < 4; ++i) {
      s[n][i] *= scale;
      s[n + 1][i] *= scale;
    }
  }
}

// -inf where a row does not see a key: `seen` by key, `rows` by row (both of 64); on the diagonal tile also where the
// key comes later, and with `strict` where it is the row's own.
__device__ void hide(float (&s)[KEYS / 8][4], uint64_t seen, uint64_t rows, bool diagonal, bool strict) {
  const Lane at;
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * at.warp + at.row + 8 * half;
    uint64_t shown = rows >> row & 1 ? seen : 0;
    if (diagonal) {
      shown &= strict ? (1ull << row) - 1 : ~0ull >> (KEYS - 1 - row);
    }
    shown >>= at.column;
    for (int n = 0; n < KEYS / 8; ++n) {
      for (int i = 0; i < 2; ++i) {
        s[n][2 * half + i] = shown >> (8 * n + i) & 1 ? s[n][2 * half + i] : -infinity();
      }
    }
  }
}

// Sums the 16 values of each of the 8 lanes with the same lane % 4. Lane l keeps two of the sums, values first and
// first + 1, first = kept_values(l).
__device__ int kept_values(int lane) {
  return (lane & 16 ? 8 : 0) + (lane & 8 ? 4 : 0) + (lane & 4 ? 2 : 0);
}

__device__ float2 sum_over_rows(float (&v)[16], int lane) {
  for (int width = 8, bit = 16; width >= 2; width /= 2, bit /= 2) {
    const bool upper = lane & bit;
    for (int i = 0; i < width; ++i) {
      const float kept = upper ? v[i + width] : v[i], sent = upper ? v[i] : v[i + width];
      v[i] = kept + __shfl_xor_sync(EVERY_LANE, sent, bit);
    }
  }
  return {v[0], v[1]};
}

}  // namespace
}  // namespace eah::cuda
