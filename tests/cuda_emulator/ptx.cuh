// Stands in for csrc/cuda/ptx.cuh where there is no GPU: the same names, computed by a CPU, so that the kernels' source
// compiles unchanged with a C++ compiler. It shows what the kernels compute, not what a GPU does with them.
//
// A thread of the grid is a fiber (emulator.cpp). What the lanes of a warp do together waits for all 32 of them; the
// fragments of ldmatrix and mma are laid out as the PTX ISA documents them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __device__
#define __global__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

namespace emulator {

struct Index {
  int x;
};
extern Index thread, block, grid;

enum Kind { BALLOT, SHUFFLE, MATRICES, TRANSPOSED, MULTIPLY, SYNC_WARP };

// Waits until every lane of the warp has called it with the same kind; the last to come runs `together` on the inputs.
void in_warp(Kind kind, const void* in, size_t in_size, void* out, size_t out_size,
             void (*together)(const void* in, void* out));
void in_block();
void in_grid();
void* shared_memory();
void copy_async(void* to, const void* from, bool valid);
void wait_for_copies();
int resident_blocks();
const char* run(void (*body)(const void*), const void* arguments, int64_t blocks, int threads, size_t shared_bytes);

template <typename In, typename Out>
Out lanes(Kind kind, const In& in, void (*together)(const In* in, Out* out)) {
  static void (*call)(const In*, Out*);
  call = together;
  Out out;
  in_warp(kind, &in, sizeof in, &out, sizeof out, [](const void* in, void* out) {
    call(static_cast<const In*>(in), static_cast<Out*>(out));
  });
  return out;
}

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define gridDim emulator::grid

inline void __syncthreads() {
  emulator::in_block();
}
inline void __syncwarp() {
  emulator::lanes<int, int>(emulator::SYNC_WARP, 0, [](const int*, int* out) { std::memset(out, 0, 128); });
}

inline unsigned __ballot_sync(unsigned, bool mine) {
  return emulator::lanes<int, unsigned>(emulator::BALLOT, mine, [](const int* in, unsigned* out) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      all |= static_cast<unsigned>(in[lane] != 0) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      out[lane] = all;
    }
  });
}

template <typename V>
V __shfl_sync(unsigned, V mine, int from) {
  struct In {
    V value;
    int from;
  };
  return emulator::lanes<In, V>(emulator::SHUFFLE, {mine, from % 32}, [](const In* in, V* out) {
    for (int lane = 0; lane < 32; ++lane) {
      out[lane] = in[in[lane].from].value;
    }
  });
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V mine, int bit) {
  return __shfl_sync(mask, mine, (threadIdx.x % 32) ^ bit);
}

inline int atomicAdd(int* to, int n) {
  const int before = *to;
  *to += n;
  return before;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __int_as_float(int32_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits));
}
inline int min(int a, int b) {
  return a < b ? a : b;
}

namespace eah::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename Shared>
Shared& shared_memory() {
  return *static_cast<Shared*>(emulator::shared_memory());
}

inline float to_float(float x) {
  return x;
}
inline float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline float to_float(Half x) {
  return emulator::half_to_float(x.bits);
}

template <typename T>
uint32_t pack(float low, float high) {
  const auto round = std::is_same_v<T, Half> ? emulator::float_to_half : emulator::float_to_bfloat16;
  return round(low) | static_cast<uint32_t>(round(high)) << 16;
}

inline void store(float* to, float x) {
  *to = x;
}
template <typename T>
void store(T* to, float x) {
  to->bits = static_cast<uint16_t>(pack<T>(x, 0));
}

inline float exp2_approximate(float x) {
  return std::exp2(x);
}

inline uint4 load(const void* global, bool valid) {
  uint4 words = {};
  if (valid) {
    std::memcpy(&words, global, sizeof words);
  }
  return words;
}

using emulator::copy_async;
using emulator::wait_for_copies;

// Matrix m's row r is the address of lane 8 m + r. Lane l gets its register m from row l / 4, columns 2 (l % 4) and the
// next; transposed: from column l / 4, rows 2 (l % 4) and the next.
struct Fragments {
  uint32_t r[4];
};

template <bool TRANSPOSE>
void load_fragments(uint32_t (&r)[4], const void* row) {
  const auto kind = TRANSPOSE ? emulator::TRANSPOSED : emulator::MATRICES;
  const auto got = emulator::lanes<const void*, Fragments>(kind, row, [](const void* const* rows, Fragments* out) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int outer = lane / 4, inner = 2 * (lane % 4) + i;
          pair[i] = static_cast<const uint16_t*>(rows[8 * m + (TRANSPOSE ? inner : outer)])[TRANSPOSE ? outer : inner];
        }
        out[lane].r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
  std::memcpy(r, got.r, sizeof r);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_fragments<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_fragments<true>(r, row);
}

struct Operands {
  float c[4];
  uint32_t a[4], b[2];
};
struct Accumulators {
  float c[4];
};

template <typename T>
float element(const uint32_t* words, int i) {
  return to_float(T{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", with group = lane / 4, place = lane % 4:
//   a, element i: row group (+ 8 if i / 2 is odd), column 2 place + i % 2 (+ 8 from i = 4 on);
//   b, element i: row 2 place + i % 2 (+ 8 from i = 2 on), column group;
//   c, element i: row group (+ 8 from i = 2 on), column 2 place + i % 2.
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Operands mine = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto sum = emulator::lanes<Operands, Accumulators>(
      emulator::MULTIPLY, mine, [](const Operands* in, Accumulators* out) {
        double left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / 4, place = lane % 4;
          for (int i = 0; i < 8; ++i) {
            left[group + 8 * (i / 2 % 2)][2 * place + i % 2 + 8 * (i / 4)] = element<T>(in[lane].a, i);
          }
          for (int i = 0; i < 4; ++i) {
            right[2 * place + i % 2 + 8 * (i / 2)][group] = element<T>(in[lane].b, i);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double total = in[lane].c[i];
            for (int k = 0; k < 16; ++k) {
              total += left[row][k] * right[k][column];
            }
            out[lane].c[i] = static_cast<float>(total);
          }
        }
      });
  std::memcpy(c, sum.c, sizeof c);
}

inline void grid_barrier() {
  emulator::in_grid();
}

template <typename Arguments>
const char* launch_cooperative(
    void (*kernel)(Arguments), int64_t most, int threads, size_t shared_bytes, const Arguments& arguments, void*) {
  static void (*launched)(Arguments);
  launched = kernel;
  const int64_t fit = emulator::resident_blocks();
  return emulator::run(
      [](const void* copy) { launched(*static_cast<const Arguments*>(copy)); }, &arguments, most < fit ? most : fit,
      threads, shared_bytes);
}

}  // namespace eah::cuda
