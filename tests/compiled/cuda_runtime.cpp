// Stands in for libcudart: what nvcc's host code calls to register and launch kernels. A launch goes to Python.

#include <cstddef>
#include <map>
#include <string>

struct dim3 {
  unsigned x, y, z;
};
using LaunchCallback = int (*)(const char* kernel, int grid, int threads, const void* params, size_t shared_bytes);

namespace {
std::map<const void*, std::string>& kernels() {  // by the address of the host's stub; first used before main
  static std::map<const void*, std::string> names;
  return names;
}
LaunchCallback launch;
int blocks = 4;  // that are resident at once on this device
constexpr int NOT_SUPPORTED = 801;
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void eah_compiled(LaunchCallback callback, int resident_blocks) {
  launch = callback;
  blocks = resident_blocks;
}

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[stub] = name;
}

EXPORT int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
EXPORT int cudaDeviceGetAttribute(int* value, int, int) {  // only the number of multiprocessors is asked for
  *value = 1;
  return 0;
}
EXPORT int cudaFuncSetAttribute(const void*, int, int) {
  return 0;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* fit, const void*, int, size_t) {
  *fit = blocks;
  return 0;
}
EXPORT int cudaLaunchCooperativeKernel(
    const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, void*) {
  return launch(kernels().at(stub).c_str(), static_cast<int>(grid.x), static_cast<int>(block.x), arguments[0],
                shared_bytes);
}
EXPORT const char* cudaGetErrorString(int) {
  return "the compiled kernel failed";
}
EXPORT int cudaGetLastError() {
  return 0;
}

// An ordinary launch, by <<<>>>, which the kernels do not use; nvcc's stubs refer to it.
EXPORT int __cudaGetKernel(void**, const void*) {
  return NOT_SUPPORTED;
}
EXPORT int __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, void*, unsigned) {
  return NOT_SUPPORTED;
}
EXPORT unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return NOT_SUPPORTED;
}

// csrc/cuda/bindings.cpp asks torch for it.
EXPORT int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
