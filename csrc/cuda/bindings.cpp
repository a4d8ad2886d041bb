// The module eah_kernels._cuda: two ops for CUDA tensors of the current device and the scratch memory they want, in
// floats. eah_kernels/native/cuda.py calls them after it has checked the tensors.
//
// Only torch's stable ABI and Python's limited API are used, so that one build serves every torch from 2.10 on.

#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "attention.h"

// The build of tests/compiled has another name, and takes CPU tensors.
#ifndef EAH_OPS
#define EAH_OPS eah_kernels_cuda
#define EAH_DISPATCH_KEY CUDA
#endif
#define EAH_LIBRARY(name, library) STABLE_TORCH_LIBRARY(name, library)

namespace {

using eah::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

eah::View view(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

eah::View flags(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), 0, 0, x.stride(1)};
}

Dtype dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Dtype::Half;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Float: return Dtype::Float;
    default: STD_TORCH_CHECK(false, "query must be float16, bfloat16 or float32");
  }
}

eah::cuda::Problem problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
                           const std::optional<Tensor>& mask, double scale, const Tensor& scratch) {
  eah::cuda::Problem p = {};
  p.dtype = dtype(query);
  p.batch = static_cast<int>(query.size(0));
  p.heads = static_cast<int>(query.size(1));
  p.kv_heads = static_cast<int>(key.size(1));
  p.q_len = static_cast<int>(query.size(2));
  p.kv_len = static_cast<int>(key.size(2));
  p.dim = static_cast<int>(query.size(3));
  p.query = view(query);
  p.key = view(key);
  p.value = view(value);
  p.output = view(output);
  p.mask = mask ? flags(*mask) : eah::View{};
  p.scale = static_cast<float>(scale);
  p.scratch = static_cast<float*>(scratch.data_ptr());
  return p;
}

template <typename Problem>
void launch(const char* (*kernel)(const Problem&, void*), const Problem& p, const Tensor& query) {
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(query.get_device_index(), &stream) == 0, "torch has no current CUDA stream");
  const char* error = kernel(p, stream);
  STD_TORCH_CHECK(error == nullptr, "eah_kernels._cuda: ", error);
}

void prefill(
    Tensor query, Tensor key, Tensor value, Tensor image_mask, std::optional<Tensor> mask, double scale,
    double threshold, double min_density, Tensor output, Tensor head, Tensor sink_counts, Tensor scratch) {
  eah::cuda::Prefill p = {problem(query, key, value, output, mask, scale, scratch)};
  p.image = flags(image_mask);
  p.threshold = static_cast<float>(threshold);
  p.min_density = static_cast<float>(min_density);
  p.head = static_cast<int32_t*>(head.data_ptr());
  p.counts = static_cast<int32_t*>(sink_counts.data_ptr());
  launch(eah::cuda::prefill, p, query);
}

void few_rows(
    Tensor query, Tensor key, Tensor value, Tensor head, std::optional<Tensor> mask, double scale, Tensor output,
    Tensor scratch) {
  eah::cuda::FewRows p = {problem(query, key, value, output, mask, scale, scratch)};
  p.head = static_cast<const int32_t*>(head.data_ptr());
  launch(eah::cuda::few_rows, p, query);
}

int64_t prefill_scratch(int64_t batch, int64_t heads, int64_t q_len) {
  return eah::cuda::prefill_scratch(static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(q_len));
}

int64_t few_rows_scratch(int64_t batch, int64_t heads, int64_t kv_heads, int64_t kv_len, int64_t dim) {
  return eah::cuda::few_rows_scratch(
      static_cast<int>(batch), static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(kv_len),
      static_cast<int>(dim));
}

}  // namespace

EAH_LIBRARY(EAH_OPS, library) {
  library.def(
      "prefill(Tensor query, Tensor key, Tensor value, Tensor image_mask, Tensor? mask, float scale, float threshold, "
      "float min_density, Tensor(a!) output, Tensor(b!) head, Tensor(c!) sink_counts, Tensor(d!) scratch) -> ()");
  library.def(
      "few_rows(Tensor query, Tensor key, Tensor value, Tensor head, Tensor? mask, float scale, Tensor(a!) output, "
      "Tensor(b!) scratch) -> ()");
  library.def("prefill_scratch(int batch, int heads, int q_len) -> int");
  library.def("few_rows_scratch(int batch, int heads, int kv_heads, int kv_len, int dim) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(EAH_OPS, CompositeExplicitAutograd, library) {
  library.impl("prefill_scratch", TORCH_BOX(&prefill_scratch));
  library.impl("few_rows_scratch", TORCH_BOX(&few_rows_scratch));
}

STABLE_TORCH_LIBRARY_IMPL(EAH_OPS, EAH_DISPATCH_KEY, library) {
  library.impl("prefill", TORCH_BOX(&prefill));
  library.impl("few_rows", TORCH_BOX(&few_rows));
}

PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
