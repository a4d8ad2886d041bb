// What the CPU and the CUDA kernels call by the same name. No torch header: the CUDA kernels work on raw pointers.
#pragma once

#include <cstdint>

namespace eah {

enum class Dtype { Half, BFloat16, Float, Double, Bool };  // the last two are of masks alone

// A tensor as a kernel sees it (bundles.py): strides in elements, 0 along what it does not depend on.
struct View {
  void* data = nullptr;  // none: the tensor is not there
  int64_t b = 0, h = 0, row = 0, column = 0;
};

}  // namespace eah
