// Fragments and products of the matrix instructions, as the PTX ISA documents them; sums in float32, k ascending.
#pragma once

#include "machine.h"

namespace emulator {

inline float as_float(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline u32 as_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float bfloat16(u32 bits) {
  return as_float(bits << 16);
}
inline float half(u32 bits) {
  const u32 sign = (bits & 0x8000) << 16, size = bits & 0x7fff;
  const u32 scaled = as_bits(as_float(size << 13) * 0x1p112f);
  return as_float(sign | (size >= 0x7c00 ? 0x7f800000 | (size & 0x3ff) << 13 : scaled));
}
inline float tf32(u32 bits) {
  return as_float(bits & 0xffffe000);
}

enum Kind { F16, BF16, TF32 };

template <int KIND>
float low(u32 pair) {
  return KIND == F16 ? half(pair & 0xffff) : bfloat16(pair & 0xffff);
}
template <int KIND>
float high(u32 pair) {
  return KIND == F16 ? half(pair >> 16) : bfloat16(pair >> 16);
}

// Depth of a product: 16 elements of 2 bytes, or 8 of 4.
template <int KIND>
constexpr int DEPTH = KIND == TF32 ? 8 : 16;

// Rows 0 .. 15 of A from the four registers of every lane: mma.m16n8k16 (k8) and each warp of wgmma.
template <int KIND>
void fragment_a(const u32* const* a, float (&to)[16][16]) {
  for (int r = 0; r < 4; ++r) {
    for (int lane = 0; lane < LANES; ++lane) {
      const int row = lane / 4 + 8 * (r % 2);
      if (KIND == TF32) {
        to[row][lane % 4 + 4 * (r / 2)] = tf32(a[r][lane]);
      } else {
        const int column = 2 * (lane % 4) + 8 * (r / 2);
        to[row][column] = low<KIND>(a[r][lane]);
        to[row][column + 1] = high<KIND>(a[r][lane]);
      }
    }
  }
}

// mma.m16n8k16, or k8 of TF32. `lanes`: those that take part; here always all.
template <int KIND>
void multiply(u32* const* d, const u32* const* a, const u32* const* b, const u32* const* c) {
  float left[16][16], right[16][8], sum[16][8];
  fragment_a<KIND>(a, left);
  for (int r = 0; r < 2; ++r) {
    for (int lane = 0; lane < LANES; ++lane) {
      if (KIND == TF32) {
        right[lane % 4 + 4 * r][lane / 4] = tf32(b[r][lane]);
      } else {
        right[2 * (lane % 4) + 8 * r][lane / 4] = low<KIND>(b[r][lane]);
        right[2 * (lane % 4) + 8 * r + 1][lane / 4] = high<KIND>(b[r][lane]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < LANES; ++lane) {
      sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = as_float(c[i][lane]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < DEPTH<KIND>; ++k) {
      const float x = left[row][k];
      for (int column = 0; column < 8; ++column) {
        sum[row][column] += x * right[k][column];
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < LANES; ++lane) {
      d[i][lane] = as_bits(sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    }
  }
}

// ---- wgmma

// A matrix in shared memory: where the 16 bytes lie that hold `chunk` of a line. K-major, a line is a row of M or N and
// its chunks follow K; otherwise a line is one k and its chunks follow M or N.
class Descriptor {
 public:
  explicit Descriptor(u64 bits)
      : start_((bits & 0x3fff) << 4), leading_((bits >> 16 & 0x3fff) << 4), stride_((bits >> 32 & 0x3fff) << 4) {
    const int mode = static_cast<int>(bits >> 62);
    width_ = mode == 0 ? 1 : 16 >> mode;  // chunks of a line of a swizzled atom
    if (bits >> 49 & 7) {
      fault("a wgmma descriptor with a base offset");
    }
  }

  u64 k_major(int row, int chunk) const {
    if (width_ == 1) {
      return start_ + row / 8 * stride_ + chunk * leading_ + row % 8 * 16;
    }
    return swizzle(start_ + row / 8 * stride_ + row % 8 * width_ * 16 + chunk * 16);
  }
  u64 mn_major(int k, int chunk) const {
    if (width_ == 1) {
      return start_ + chunk * stride_ + k / 8 * leading_ + k % 8 * 16;
    }
    return swizzle(start_ + chunk / width_ * leading_ + k / 8 * stride_ + k % 8 * width_ * 16 + chunk % width_ * 16);
  }

 private:
  u64 swizzle(u64 address) const {
    return address ^ ((address >> 7 & (width_ - 1)) << 4);
  }
  u64 start_, leading_, stride_, width_;
};

template <int KIND>
float element(const u8* chunk, int i) {
  if (KIND == TF32) {
    u32 bits;
    std::memcpy(&bits, chunk + 4 * i, 4);
    return tf32(bits);
  }
  u16 bits;
  std::memcpy(&bits, chunk + 2 * i, 2);
  return KIND == F16 ? half(bits) : bfloat16(bits);
}

// to[k][i], of lines or columns first .. first + count - 1 of M or N.
template <int KIND, int WIDTH>
void load_matrix(Shared& shared, int warp, u64 bits, bool transposed, int first, int count, float (&to)[16][WIDTH]) {
  constexpr int CHUNK = KIND == TF32 ? 4 : 8;
  const Descriptor descriptor(bits);
  if (!transposed) {
    for (int i = 0; i < count; ++i) {
      for (int chunk = 0; chunk < 2; ++chunk) {
        const u8* data = shared.read_async(descriptor.k_major(first + i, chunk), 16, warp);
        for (int e = 0; e < CHUNK; ++e) {
          to[chunk * CHUNK + e][i] = element<KIND>(data, e);
        }
      }
    }
  } else {
    for (int k = 0; k < DEPTH<KIND>; ++k) {
      for (int chunk = 0; chunk < count / CHUNK; ++chunk) {
        const u8* data = shared.read_async(descriptor.mn_major(k, first / CHUNK + chunk), 16, warp);
        for (int e = 0; e < CHUNK; ++e) {
          to[k][chunk * CHUNK + e] = element<KIND>(data, e);
        }
      }
    }
  }
}

// wgmma.m64nNk16 (k8): the 16 rows of one warp. Operands, as ../lowering.py orders them: D, A's four registers or a
// descriptor, B's descriptor, scale-d; size: bit 0 set when A is transposed, bit 1 when B is; immediate: N.
template <int KIND>
void multiply_async(Shared& shared, Warp& warp, const Multiply& work, const i32* operands) {
  const Instruction& in = *work.instruction;
  const int columns = static_cast<int>(in.immediate), results = columns / 2;
  static thread_local float left[16][16], right[16][256], sum[16][256];
  if (in.number == results + 3) {
    float across[16][16];
    load_matrix<KIND>(shared, warp.index, work.a, in.size & 1, warp.index % 4 * 16, 16, across);
    for (int k = 0; k < DEPTH<KIND>; ++k) {
      for (int row = 0; row < 16; ++row) {
        left[row][k] = across[k][row];
      }
    }
  } else {
    const u32* a[4];
    for (int r = 0; r < 4; ++r) {
      a[r] = warp.at<u32>(operands[results + r]);
    }
    fragment_a<KIND>(a, left);
  }
  load_matrix<KIND>(shared, warp.index, work.b, in.size & 2, 0, columns, right);
  for (int i = 0; i < results; ++i) {
    const u32* from = warp.at<u32>(operands[i]);
    for (int lane = 0; lane < LANES; ++lane) {
      sum[lane / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + 2 * (lane % 4) + i % 2] = work.adds ? as_float(from[lane]) : 0.0f;
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < DEPTH<KIND>; ++k) {
      const float x = left[row][k];
      for (int column = 0; column < columns; ++column) {
        sum[row][column] += x * right[k][column];
      }
    }
  }
  for (int i = 0; i < results; ++i) {
    u32* to = warp.at<u32>(operands[i]);
    for (int lane = 0; lane < LANES; ++lane) {
      to[lane] = as_bits(sum[lane / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + 2 * (lane % 4) + i % 2]);
    }
  }
}

}  // namespace emulator
