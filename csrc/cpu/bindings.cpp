// The module eah_kernels._C: two ops for CPU tensors, which eah_kernels/native/cpu.py calls.
//
// Importing it checks that torch is the version it was built with before anything of torch is called.

#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <torch/library.h>
#include <torch/version.h>

#include "attention.h"

namespace {

using at::Tensor;
using eah::Dtype;
using eah::cpu::Problem;

#define EAH_TEXT_(x) #x
#define EAH_TEXT(x) EAH_TEXT_(x)
constexpr char BUILT_FOR[] = EAH_TEXT(TORCH_VERSION_MAJOR) "." EAH_TEXT(TORCH_VERSION_MINOR) ".";

// masks.py's Scoring as an op takes it.
#define EAH_RULES                                                                                   \
  const std::optional<Tensor>&mask, bool causal, double scale, std::optional<int64_t> sliding_window, \
      std::optional<double> softcap

eah::View view(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

Dtype dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kHalf: return Dtype::Half;
    case at::kBFloat16: return Dtype::BFloat16;
    case at::kFloat: return Dtype::Float;
    case at::kDouble: return Dtype::Double;
    case at::kBool: return Dtype::Bool;
    default: TORCH_CHECK_TYPE(false, "a tensor of dtype ", x.scalar_type(), " is of no use here");
  }
}

Problem problem(const Tensor& query, const Tensor& key, EAH_RULES) {
  Problem p;
  p.dtype = dtype(query);
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.kv_heads = key.size(1);
  p.q_len = query.size(2);
  p.kv_len = key.size(2);
  p.dim = query.size(3);
  p.query = view(query);
  p.key = view(key);
  p.scoring.causal = causal;
  p.scoring.scale = static_cast<float>(scale);
  // A window over everything is no window; so bounded, a position minus it cannot overflow.
  const int64_t window = sliding_window.value_or(0);
  p.scoring.window = window < query.size(2) + key.size(2) ? window : 0;
  p.scoring.softcap = static_cast<float>(softcap.value_or(0));
  if (mask) {
    const Tensor full = mask->dim() == 2 ? mask->unsqueeze(1).unsqueeze(1) : *mask;
    p.scoring.mask_dtype = dtype(full);
    p.scoring.mask_heads = full.size(1);
    p.scoring.mask = view(full.expand({query.size(0), full.size(1), query.size(2), key.size(2)}));
    if (full.size(1) == 1) {
      p.scoring.mask.h = 0;
    }
  }
  return p;
}

struct Kernels {
  eah::cpu::Statistics* statistics;
  eah::cpu::Attend* attend;
};

Kernels kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return {eah::cpu::AVX512::statistics, eah::cpu::AVX512::attend};
  }
  if (capability == "AVX2") {
    return {eah::cpu::AVX2::statistics, eah::cpu::AVX2::attend};
  }
#endif
  return {eah::cpu::DEFAULT::statistics, eah::cpu::DEFAULT::attend};
}

// Row log-sum-exp (B, Hq, Sq), or (0,) unless wanted, and column means (B, Hq, Skv), 0 off the image.
std::tuple<Tensor, Tensor> statistics(
    const Tensor& query, const Tensor& key, const Tensor& image_mask, bool want_lse, EAH_RULES) {
  const auto options = query.options().dtype(at::kFloat);
  const Tensor mean = at::empty({query.size(0), query.size(1), key.size(2)}, options);
  const Tensor lse = at::empty(want_lse ? query.sizes().slice(0, 3) : c10::IntArrayRef{0}, options);
  const Tensor image = image_mask.contiguous();
  kernels().statistics(
      problem(query, key, mask, causal, scale, sliding_window, softcap), image.const_data_ptr<bool>(),
      mean.data_ptr<float>(), want_lse ? lse.data_ptr<float>() : nullptr);
  return {lse, mean};
}

// Writes into output (B, Hq, Sq, Dv), whose last dimension is contiguous.
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& head, Tensor output, EAH_RULES) {
  TORCH_CHECK(output.stride(3) == 1 || output.size(3) == 1, "output's last dimension must be contiguous");
  const Tensor chosen = head.contiguous();
  for (int64_t b = 0; b < chosen.size(0); ++b) {
    const int32_t h = chosen.const_data_ptr<int32_t>()[b];
    TORCH_CHECK_VALUE(h < query.size(1), "head must be -1 or one of ", query.size(1), " query heads, got ", h);
  }
  kernels().attend(
      problem(query, key, mask, causal, scale, sliding_window, softcap), {view(value), value.size(3)},
      chosen.const_data_ptr<int32_t>(), view(output));
}

void register_ops() {
  static torch::Library library(torch::Library::DEF, "eah_kernels_native", std::nullopt, __FILE__, __LINE__);
  const std::string rules = "Tensor? attention_mask, bool causal, float scale, int? sliding_window, float? softcap)";
  const std::string scored = "(Tensor query, Tensor key, ";
  library.def(
      ("statistics" + scored + "Tensor image_mask, bool want_lse, " + rules + " -> (Tensor, Tensor)").c_str(),
      statistics);
  library.def(
      ("attend" + scored + "Tensor value, Tensor head, Tensor(a!) output, " + rules + " -> ()").c_str(), attend);
}

// "2.13.0+cpu", or null with a Python error set.
PyObject* torch_version() {
  PyObject* torch = PyImport_ImportModule("torch");
  PyObject* version = torch ? PyObject_GetAttrString(torch, "__version__") : nullptr;
  Py_XDECREF(torch);
  PyObject* text = version ? PyObject_Str(version) : nullptr;
  Py_XDECREF(version);
  PyObject* bytes = text ? PyUnicode_AsUTF8String(text) : nullptr;
  Py_XDECREF(text);
  return bytes;
}

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  PyObject* version = torch_version();
  if (!version) {
    return nullptr;
  }
  const std::string installed = PyBytes_AsString(version);
  Py_DECREF(version);
  if (installed.rfind(BUILT_FOR, 0) != 0) {
    PyErr_Format(
        PyExc_ImportError, "it was built for torch %s* and torch %s is installed", BUILT_FOR, installed.c_str());
    return nullptr;
  }
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  register_ops();
  return PyModule_Create(&definition);
}
