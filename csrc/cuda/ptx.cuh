// What the kernels ask of the GPU beyond C++: PTX instructions (sm_80 and up), the grid barrier and the launch.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace eah::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

extern __shared__ uint4 shared_words[];

// The block's shared memory, as the launch sized it.
template <typename Shared>
__device__ Shared& shared_memory() {
  return *reinterpret_cast<Shared*>(shared_words);
}

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ inline float to_float(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

// Two floats rounded to T, `low` in the lower half.
template <typename T>
__device__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

__device__ inline void store(float* to, float x) {
  *to = x;
}
template <typename T>
__device__ void store(T* to, float x) {
  to->bits = static_cast<uint16_t>(pack<T>(x, 0));
}

__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Starts a copy of 16 bytes to shared memory; unless `valid`, nothing is read and zeros are written.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// 16 bytes of memory that the kernel does not write; unless `valid`, nothing is read and they are zeros. No branch, so
// that many can be under way at once.
__device__ inline uint4 load(const void* global, bool valid) {
  uint4 words;
  asm("{\n"
      ".reg .pred valid;\n"
      "setp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@valid ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
      : "l"(global), "r"(static_cast<int>(valid)));
  return words;
}

// Waits for this thread's copies.
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8), accumulated in float32.
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Every block of the grid gets here before any goes on, and sees what the others wrote to global memory.
__device__ inline void grid_barrier() {
  cooperative_groups::this_grid().sync();
}

// One cooperative launch of as many blocks as can be resident at once, at most `most`. Null, or what went wrong.
template <typename Arguments>
const char* launch_cooperative(
    void (*kernel)(Arguments), int64_t most, int threads, size_t shared_bytes, const Arguments& arguments,
    void* stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function, threads, shared_bytes);
  }
  const int64_t fit = static_cast<int64_t>(multiprocessors) * resident;
  if (error == cudaSuccess && fit == 0) {
    return "no block of the kernel fits this device";
  }
  if (error == cudaSuccess) {
    Arguments copy = arguments;
    void* pointers[] = {&copy};
    error = cudaLaunchCooperativeKernel(
        function, dim3(static_cast<unsigned>(most < fit ? most : fit)), dim3(threads), pointers, shared_bytes,
        static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) {
    return nullptr;
  }
  cudaGetLastError();  // so that the next call does not report it again
  return cudaGetErrorString(error);
}

}  // namespace eah::cuda
