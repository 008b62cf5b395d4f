// SPDX-License-Identifier: Apache-2.0
// The raw operators torch.ops.sparsebwd_cuda.*: argument checks, then kernels launched on PyTorch's
// current stream. Nothing waits for the device: what the CPU's operators return as numbers stays in
// `stats`, float32 [3] on the device: tau, sigma, density. Built against PyTorch's stable ABI, so
// that one binary serves every torch >= 2.11 with CUDA.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "kernels.h"

// ---- the device: the only part that differs where the kernels run under the emulator

#ifdef SPARSEBWD_EMULATOR

#define SPARSEBWD_OPERATORS sparsebwd_emulated

namespace {

constexpr char kDevice[] = "the CPU, as the kernels are emulated";

bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

cudaStream_t current_stream(int32_t) { return nullptr; }

std::tuple<std::string, int64_t, int64_t> build() { return {"emulator", 0, 0}; }

}  // namespace

#else

#define SPARSEBWD_OPERATORS sparsebwd_cuda

// Declared in PyTorch's own header only where that was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

constexpr char kDevice[] = "a CUDA device";

bool is_on_device(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

void check_runtime(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + cudaGetErrorString(error));
}

// Makes the device current, for PyTorch and for the kernels: these are linked with a CUDA runtime
// of their own, which keeps a current device of its own.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) : guard_(index) {
    check_runtime(cudaSetDevice(index), "the device cannot be used: ");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

cudaStream_t current_stream(int32_t index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Architectures as setup.py was given them, the CUDA version built with and the one that the driver
// runs, both as 1000 * major + 10 * minor (0: there is no driver).
std::tuple<std::string, int64_t, int64_t> build() {
  int driver = 0;
  check_runtime(cudaDriverGetVersion(&driver), "the driver does not answer: ");
  return {SPARSEBWD_CUDA_ARCHITECTURES, CUDART_VERSION, driver};
}

}  // namespace

#endif

namespace {

namespace cuda = sparsebwd::cuda;
using namespace sparsebwd::checks;
using sparsebwd::ConvProblem;
using sparsebwd::DType;

// ---- argument checks

constexpr int64_t kMostOfDimension = std::numeric_limits<int32_t>::max();  // see cuda::PruneCall

void check_on_device(const Tensor& tensor, const char* name) {
  check(is_on_device(tensor), name, ": got a tensor on another device, accepted is ", kDevice);
}

void check_beside(const Tensor& tensor, const char* name, const Tensor& first,
                  const char* first_name) {
  check(is_on_device(tensor) && tensor.get_device_index() == first.get_device_index(), name,
        ": got a tensor on another device, accepted is that of ", first_name);
}

DType checked_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
        ": got a tensor of dtype ", toString(type),
        ", accepted are Float (float32), BFloat16 and Half (float16)");
  return type == ScalarType::Float      ? DType::kFloat32
         : type == ScalarType::BFloat16 ? DType::kBFloat16
                                        : DType::kFloat16;
}

void check_vector(const Tensor& tensor, const char* name, ScalarType type, int64_t size) {
  check(tensor.scalar_type() == type && tensor.dim() == 1 && tensor.size(0) == size &&
            tensor.stride(0) == 1,
        name, ": got ", toString(tensor.scalar_type()), " of shape ", text(tensor.sizes()),
        ", accepted is ", toString(type), " of shape [", size, "]");
}

float* checked_stats(const Tensor& stats, const Tensor& g, const char* g_name) {
  check_beside(stats, "stats", g, g_name);
  check_vector(stats, "stats", ScalarType::Float, 3);
  return static_cast<float*>(stats.mutable_data_ptr());
}

// How to prune g; nothing without a key.
std::optional<cuda::Pruning> checked_pruning(const std::optional<Tensor>& key,
                                             double sigma_coefficient, double quantile,
                                             const std::optional<Tensor>& sigma_history,
                                             const std::optional<Tensor>& scales, const Tensor& g,
                                             const char* g_name) {
  check(key || !sigma_history, "sigma_history: got a tensor without a key, accepted is None then");
  check(key || !scales, "scales: got a tensor without a key, accepted is None then");
  if (!key) return std::nullopt;
  check_beside(*key, "key", g, g_name);
  check_key(*key);
  const std::pair<double, const char*> both[] = {{sigma_coefficient, "sigma_coefficient"},
                                                 {quantile, "quantile"}};
  for (const auto& [value, name] : both)
    check(std::isfinite(value) && value >= 0.0, name, ": got ", value,
          ", accepted are finite numbers >= 0");
  cuda::Pruning pruning = {static_cast<const int64_t*>(key->const_data_ptr()), sigma_coefficient,
                           quantile, nullptr, nullptr};
  if (sigma_history) {
    check_beside(*sigma_history, "sigma_history", g, g_name);
    check_vector(*sigma_history, "sigma_history", ScalarType::Int, 1 + sparsebwd::kSigmaHistory);
    pruning.sigma_history = static_cast<int32_t*>(sigma_history->mutable_data_ptr());
  }
  if (scales) {
    check_beside(*scales, "scales", g, g_name);
    check_vector(*scales, "scales", ScalarType::Float, g.size(0));
    pruning.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  return pruning;
}

void check_operand(const Tensor& tensor, const char* name, const Tensor& grad_output,
                   const Sizes& size) {
  check_beside(tensor, name, grad_output, "grad_output");
  check(tensor.scalar_type() == grad_output.scalar_type() && has_sizes(tensor, size), name,
        ": got ", toString(tensor.scalar_type()), " of shape ", text(tensor.sizes()),
        ", accepted is a tensor of grad_output's dtype, ", toString(grad_output.scalar_type()),
        ", and of shape ", text(size));
}

// ---- launches

constexpr size_t kAlignment = 256;

// Memory of PyTorch's allocator, with any contents. Kernels may be using it when this goes out of
// scope: whoever gets it next does so on the same stream, after them.
class Memory {
 public:
  Memory(const Tensor& beside, size_t bytes) {
    if (bytes == 0) return;
    const int64_t size[] = {static_cast<int64_t>(bytes + kAlignment - 1)};
    tensor_ = torch::stable::new_empty(beside, {size, 1}, ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(tensor_->mutable_data_ptr());
    start_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  void* start() const { return start_; }  // null if it is empty

 private:
  std::optional<Tensor> tensor_;
  void* start_ = nullptr;
};

// Where the kernels of one call run: the device of its tensors, and PyTorch's current stream there.
// `cooperative`: whether a launch may wait until it has all of the device.
struct Target {
  Target(const Tensor& tensor, bool cooperative)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {
    const cudaError_t error = cuda::current_device(&device);
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("the device cannot be used: ") +
                               cudaGetErrorString(error));
    device.cooperative &= cooperative;
  }

  DeviceGuard guard;
  cudaStream_t stream;
  cuda::Device device;
};

// `problem` gives the words for what a kernel was launched on.
template <class Problem>
void check_launch(cudaError_t error, const char* kernel, const Problem& problem) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("the CUDA kernel '") + kernel + "' was not launched for " +
                           problem() + ": " + cudaGetErrorString(error));
}

const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// As Python's ConvProblem prints it.
std::string problem_text(const ConvProblem& problem, DType dtype) {
  std::ostringstream result;
  result << "n" << problem.n << "c" << problem.c << "h" << problem.h << "w" << problem.w << "k"
         << problem.k << "r" << problem.r << "s" << problem.s << "u" << problem.stride_h << "x"
         << problem.stride_w << "p" << problem.pad_h << "x" << problem.pad_w << "d" << problem.dil_h
         << "x" << problem.dil_w << "g" << problem.groups << " in " << dtype_name(dtype);
  return result.str();
}

cuda::Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// ---- operators

void prune(const Tensor& g, std::optional<Tensor> key, double sigma_coefficient, double quantile,
           std::optional<Tensor> sigma_history, std::optional<Tensor> scales, bool cooperative,
           std::optional<Tensor> out, Tensor stats) {
  check_on_device(g, "g");
  cuda::PruneCall call = {};
  call.dtype = checked_dtype(g, "g");
  call.shape = checked_prune_shape(g, "g", kMostOfDimension);
  call.g = g.const_data_ptr();
  const auto pruning =
      checked_pruning(key, sigma_coefficient, quantile, sigma_history, scales, g, "g");
  call.pruning = pruning ? &*pruning : nullptr;
  if (out) {
    check_beside(*out, "out", g, "g");
    check_alike(*out, "out", g, "g");
    call.out = out->mutable_data_ptr();
  }
  call.stats = checked_stats(stats, g, "g");

  const Target target(g, cooperative);
  const Memory workspace(g, cuda::prune_workspace(call, target.device));
  call.workspace = workspace.start();
  check_launch(cuda::prune(call, target.device, target.stream), "prune",
               [&] { return text(g.sizes()) + " in " + dtype_name(call.dtype); });
}

// The plain kernels count in 64 bits.
const char* plain_refusal(const ConvProblem&) { return nullptr; }

void conv2d_backward(const Tensor& grad_output, std::optional<Tensor> input,
                     std::optional<Tensor> weight, Sizes input_size, Sizes weight_size,
                     Sizes stride, Sizes padding, Sizes dilation, int64_t groups,
                     std::optional<Tensor> key, double sigma_coefficient, double quantile,
                     std::optional<Tensor> sigma_history, std::optional<Tensor> scales,
                     bool cooperative, std::optional<Tensor> pruned,
                     std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight,
                     Tensor stats) {
  const ConvProblem problem =
      checked_problem(input_size, weight_size, stride, padding, dilation, groups, plain_refusal);
  const Sizes output_size = {problem.n, problem.k, problem.p(), problem.q()};
  check_on_device(grad_output, "grad_output");
  const DType dtype = checked_dtype(grad_output, "grad_output");
  check_operand(grad_output, "grad_output", grad_output, output_size);

  cuda::PruneCall prune_call = {};
  prune_call.dtype = dtype;
  prune_call.shape = checked_prune_shape(grad_output, "grad_output", kMostOfDimension);
  prune_call.g = grad_output.const_data_ptr();
  const auto pruning = checked_pruning(key, sigma_coefficient, quantile, sigma_history, scales,
                                       grad_output, "grad_output");
  prune_call.pruning = pruning ? &*pruning : nullptr;
  check(key.has_value() == pruned.has_value(), "pruned: got ", pruned ? "a tensor" : "None",
        ", accepted is a tensor if there is a key, else None");
  if (pruned) {
    check_beside(*pruned, "pruned", grad_output, "grad_output");
    check_alike(*pruned, "pruned", grad_output, "grad_output");
    prune_call.out = pruned->mutable_data_ptr();
  }
  prune_call.stats = checked_stats(stats, grad_output, "grad_output");

  cuda::ConvCall agb = {};
  agb.problem = problem;
  agb.dtype = dtype;
  agb.grad_output = pruned ? prune_call.out : prune_call.g;
  agb.grad_output_strides = strides_of(pruned ? *pruned : grad_output);
  cuda::ConvCall wgc = agb;
  bool sparse = false;  // whether a kernel that reads the non-zeros is among those that run
  if (grad_input) {
    check(weight.has_value(), "weight: got None, accepted is a tensor if grad_input is wanted");
    check_operand(*weight, "weight", grad_output, weight_size);
    check_operand(*grad_input, "grad_input", grad_output, input_size);
    agb.operand = weight->const_data_ptr();
    agb.operand_strides = strides_of(*weight);
    agb.result = grad_input->mutable_data_ptr();
    agb.result_strides = strides_of(*grad_input);
    sparse |= cuda::agb_suits(agb);
  }
  if (grad_weight) {
    check(input.has_value(), "input: got None, accepted is a tensor if grad_weight is wanted");
    check_operand(*input, "input", grad_output, input_size);
    check_operand(*grad_weight, "grad_weight", grad_output, weight_size);
    wgc.operand = input->const_data_ptr();
    wgc.operand_strides = strides_of(*input);
    wgc.result = grad_weight->mutable_data_ptr();
    wgc.result_strides = strides_of(*grad_weight);
    sparse |= cuda::wgc_suits(wgc);
  }

  const Target target(grad_output, cooperative);
  const int64_t words =
      sparse ? problem.n * problem.p() * problem.q() * ((problem.k + 31) / 32) : 0;
  const Memory nonzeros(grad_output, words * sizeof(uint32_t));
  prune_call.nonzeros = static_cast<uint32_t*>(nonzeros.start());
  agb.nonzeros = wgc.nonzeros = prune_call.nonzeros;
  // One after the other, the kernels use the same workspace.
  size_t bytes = cuda::prune_workspace(prune_call, target.device);
  if (grad_input) bytes = std::max(bytes, cuda::agb_workspace(agb, target.device));
  if (grad_weight) bytes = std::max(bytes, cuda::wgc_workspace(wgc, target.device));
  const Memory workspace(grad_output, bytes);
  prune_call.workspace = agb.workspace = wgc.workspace = workspace.start();

  const auto what = [&] { return problem_text(problem, dtype); };
  check_launch(cuda::prune(prune_call, target.device, target.stream), "prune", what);
  if (grad_input) check_launch(cuda::agb(agb, target.device, target.stream), "agb", what);
  if (grad_weight) check_launch(cuda::wgc(wgc, target.device, target.stream), "wgc", what);
}

// Why no kernel takes a problem; empty if some do.
std::string refusal(Sizes input_size, Sizes weight_size, Sizes stride, Sizes padding,
                    Sizes dilation, int64_t groups) {
  const char* reason =
      checked_numbers(input_size, weight_size, stride, padding, dilation, groups, plain_refusal)
          .refusal;
  return reason ? reason : "";
}

// Why the sparse kernels of AGB and of WGC do not take a problem that others do; empty if they do.
std::tuple<std::string, std::string> refusals(Sizes input_size, Sizes weight_size, Sizes stride,
                                              Sizes padding, Sizes dilation, int64_t groups,
                                              std::string dtype) {
  const ConvProblem problem =
      checked_problem(input_size, weight_size, stride, padding, dilation, groups, plain_refusal);
  for (const DType known : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    if (dtype == dtype_name(known)) {
      const char* agb = cuda::agb_refusal(problem, known);
      const char* wgc = cuda::wgc_refusal(problem, known);
      return {agb ? agb : "", wgc ? wgc : ""};
    }
  throw std::invalid_argument("dtype: got '" + dtype +
                              "', accepted are 'float32', 'bfloat16' and 'float16'");
}

}  // namespace

STABLE_TORCH_LIBRARY(SPARSEBWD_OPERATORS, m) {
  m.def("build() -> (str, int, int)");
  m.def(
      "refusal(int[] input_size, int[] weight_size, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> str");
  m.def(
      "refusals(int[] input_size, int[] weight_size, int[] stride, int[] padding, int[] dilation, "
      "int groups, str dtype) -> (str, str)");
  m.def(
      "prune(Tensor g, Tensor? key, float sigma_coefficient, float quantile, "
      "Tensor(a!)? sigma_history, Tensor? scales, bool cooperative, Tensor(b!)? out, "
      "Tensor(c!) stats) -> ()");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor? input, Tensor? weight, int[] input_size, "
      "int[] weight_size, int[] stride, int[] padding, int[] dilation, int groups, Tensor? key, "
      "float sigma_coefficient, float quantile, Tensor(a!)? sigma_history, Tensor? scales, "
      "bool cooperative, Tensor(b!)? pruned, "
      "Tensor(c!)? grad_input, Tensor(d!)? grad_weight, Tensor(e!) stats) -> ()");
}

// No key of a device: the checks above then say in words which devices are accepted.
STABLE_TORCH_LIBRARY_IMPL(SPARSEBWD_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("build", TORCH_BOX(&build));
  m.impl("refusal", TORCH_BOX(&refusal));
  m.impl("refusals", TORCH_BOX(&refusals));
  m.impl("prune", TORCH_BOX(&prune));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
}

// `import sparsebwd._C_cuda` loads this file, which registers the operators; the module is empty.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
