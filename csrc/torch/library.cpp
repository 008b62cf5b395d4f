// SPDX-License-Identifier: Apache-2.0
// The raw operators torch.ops.sparsebwd_cpu.*: argument checks, then a torch-free kernel. Built
// against PyTorch's stable ABI, so that one binary serves every torch >= 2.11.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"
#include "conv_backward.h"
#include "conv_plan.h"
#include "depthwise.h"
#include "isa.h"
#include "layout.h"
#include "parallel.h"
#include "prune.h"

namespace {

using namespace sparsebwd::checks;
using sparsebwd::DType;

// ---- argument checks

void check_on_cpu(const Tensor& tensor, const char* name) {
  check(tensor.is_cpu(), name, ": got a tensor on another device, accepted is the CPU");
}

DType checked_dtype(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16, name, ": got a tensor of dtype ",
        toString(type), ", accepted are Float (float32) and BFloat16");
  return type == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
}

// ---- PyTorch's thread pool

struct PoolRun {
  sparsebwd::TaskBody body;
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

// Every worker takes the next task that nobody has taken: tasks need not be equally long.
void run_worker(int64_t begin, int64_t end, void* context) noexcept {
  PoolRun& run = *static_cast<PoolRun*>(context);
  for (int64_t worker = begin; worker < end; ++worker)
    for (int64_t task; (task = run.next.fetch_add(1, std::memory_order_relaxed)) < run.tasks;)
      run.body(run.context, task, static_cast<int>(worker));
}

int pool_threads() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

// The number of threads is that for which the caller made room, even if it was changed since.
void pool_run(int threads, int64_t tasks, sparsebwd::TaskBody body, void* context) {
  PoolRun run = {body, context, tasks};
  const int64_t workers = std::min<int64_t>(tasks, threads);
  if (workers <= 1) run_worker(0, workers, &run);
  else TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, run_worker, &run));
}

sparsebwd::TaskPool task_pool() { return {pool_threads(), pool_run}; }

// ---- operators

// Why this build has no sparsebwd._C_cuda, as setup.py says it; empty if it has one.
std::string why_no_cuda() {
#ifdef SPARSEBWD_NO_CUDA
  return SPARSEBWD_NO_CUDA;
#else
  return "";
#endif
}

std::string isa() { return sparsebwd::active_kernels().name; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const sparsebwd::IsaKernels* kernels : sparsebwd::supported_kernels())
    names.push_back(kernels->name);
  return names;
}

// Of a tensor whose elements are one run of memory.
DType checked_run(const Tensor& g) {
  check_on_cpu(g, "g");
  const DType dtype = checked_dtype(g, "g");
  check(g.is_contiguous() || (g.dim() == 4 && is_dense(g, kChannelsLast)), "g: got strides ",
        text(g.strides()), " for shape ", text(g.sizes()),
        ", accepted are contiguous and channels_last tensors");
  return dtype;
}

std::tuple<double, int64_t> abs_sum(const Tensor& g) {
  const DType dtype = checked_run(g);
  const sparsebwd::AbsSum result = sparsebwd::abs_sum(
      sparsebwd::active_kernels().prune, task_pool(), g.const_data_ptr(), dtype, g.numel());
  return {result.sum, result.nonzeros};
}

void histogram(const Tensor& g, Tensor counts) {
  const DType dtype = checked_run(g);
  check_on_cpu(counts, "counts");
  check(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() && counts.dim() == 1 &&
            counts.numel() == sparsebwd::kHistogramBins,
        "counts: got ", toString(counts.scalar_type()), " of shape ", text(counts.sizes()),
        ", accepted is contiguous Long (int64) of shape [", sparsebwd::kHistogramBins, "]");
  sparsebwd::histogram(task_pool(), g.const_data_ptr(), dtype, g.numel(),
                       static_cast<int64_t*>(counts.mutable_data_ptr()));
}

double expected_density(const Tensor& g, double taus_per_mean) {
  const DType dtype = checked_run(g);
  check(std::isfinite(taus_per_mean) && taus_per_mean >= 0.0, "taus_per_mean: got ", taus_per_mean,
        ", accepted are finite numbers >= 0");
  return sparsebwd::expected_density(sparsebwd::active_kernels().prune, g.const_data_ptr(), dtype,
                                     g.numel(), taus_per_mean);
}

void check_tau(double tau, const char* name, DType dtype) {
  const float threshold = static_cast<float>(tau);
  check(std::isfinite(tau) && tau >= 0.0 && threshold == tau &&
            (dtype == DType::kFloat32 ||
             sparsebwd::float_of_bfloat16(sparsebwd::bfloat16_of_float(threshold)) == threshold),
        name, ": got ", tau,
        ", accepted are finite numbers >= 0 that g's dtype represents exactly");
}

sparsebwd::PruneSpec checked_prune_spec(const Tensor& key, double tau, DType dtype) {
  check_on_cpu(key, "key");
  check_key(key);
  check_tau(tau, "tau", dtype);
  const auto* words = static_cast<const int64_t*>(key.const_data_ptr());
  return sparsebwd::make_prune_spec(static_cast<float>(tau), words[0], words[1]);
}

// One for each of `images`, or null.
const float* checked_taus(const std::optional<Tensor>& taus, int64_t images, DType dtype) {
  if (!taus) return nullptr;
  check_on_cpu(*taus, "taus");
  check(taus->scalar_type() == ScalarType::Float && taus->is_contiguous() &&
            has_sizes(*taus, {images}),
        "taus: got ", toString(taus->scalar_type()), " of shape ", text(taus->sizes()),
        ", accepted is contiguous Float (float32) of shape [", images, "]");
  const auto* values = static_cast<const float*>(taus->const_data_ptr());
  for (int64_t i = 0; i < images; ++i) check_tau(values[i], "taus", dtype);
  return values;
}

int64_t prune(const Tensor& g, const Tensor& key, double tau, Tensor out,
              std::optional<Tensor> taus) {
  check_on_cpu(g, "g");
  check_on_cpu(out, "out");
  const DType dtype = checked_dtype(g, "g");
  const sparsebwd::PruneShape shape = checked_prune_shape(g, "g");
  check_alike(out, "out", g, "g");
  const sparsebwd::PruneSpec spec = checked_prune_spec(key, tau, dtype);
  return sparsebwd::prune(sparsebwd::active_kernels().prune, task_pool(), g.const_data_ptr(), dtype,
                          shape, spec, checked_taus(taus, shape.n, dtype), out.mutable_data_ptr());
}

void copy_layout(const Tensor& src, Tensor out) {
  check_on_cpu(src, "src");
  check_on_cpu(out, "out");
  const std::pair<const Tensor*, const char*> both[] = {{&src, "src"}, {&out, "out"}};
  for (const auto& [tensor, name] : both)
    check(tensor->scalar_type() == ScalarType::Float && tensor->dim() == 4, name, ": got ",
          toString(tensor->scalar_type()), " of shape ", text(tensor->sizes()),
          ", accepted is Float (float32) of 4 dimensions");
  check(std::equal(src.sizes().begin(), src.sizes().end(), out.sizes().begin()), "out: got shape ",
        text(out.sizes()), ", accepted is that of src, ", text(src.sizes()));
  const bool from_contiguous = is_dense(src, kContiguous) && is_dense(out, kChannelsLast);
  check(from_contiguous || (is_dense(src, kChannelsLast) && is_dense(out, kContiguous)),
        "src, out: got strides ", text(src.strides()), " and ", text(out.strides()),
        ", accepted are one contiguous and one channels_last tensor");
  const int64_t channels = src.size(1), pixels = src.size(2) * src.size(3);
  sparsebwd::transpose_images(sparsebwd::active_kernels().conv, task_pool(),
                              static_cast<const float*>(src.const_data_ptr()), src.size(0),
                              from_contiguous ? channels : pixels,
                              from_contiguous ? pixels : channels,
                              static_cast<float*>(out.mutable_data_ptr()));
}

// Whether the tensor is planes (see ConvBackward), else it is channels_last. half_planes: planes of
// bfloat16 are accepted too.
bool checked_activation(const Tensor& tensor, const char* name, const Tensor& grad_output,
                        const std::vector<int64_t>& size, bool half_planes = false) {
  check_on_cpu(tensor, name);
  const bool planes = (half_planes || tensor.scalar_type() == ScalarType::Float) &&
                      tensor.dim() == 4 && is_dense(tensor, kContiguous);
  check(tensor.scalar_type() == grad_output.scalar_type() && has_sizes(tensor, size) &&
            (is_dense(tensor, kChannelsLast) || planes),
        name, ": got ", toString(tensor.scalar_type()), " of shape ", text(tensor.sizes()),
        " and strides ", text(tensor.strides()),
        ", accepted is a channels_last tensor, or a contiguous one",
        half_planes ? "" : " of float32", ", of grad_output's dtype and of shape ", text(size));
  return !is_dense(tensor, kChannelsLast);
}

sparsebwd::WeightStrides checked_weight(const Tensor& tensor, const char* name,
                                        const std::vector<int64_t>& size) {
  check_on_cpu(tensor, name);
  check(has_sizes(tensor, size), name, ": got shape ", text(tensor.sizes()), ", accepted is ",
        text(size));
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

const char* why_refused(const sparsebwd::ConvProblem& problem) {
  return sparsebwd::conv_refusal(sparsebwd::active_kernels().conv, problem);
}

// Why conv2d_backward does not take a problem; empty if it does.
std::string refusal(std::vector<int64_t> input_size, std::vector<int64_t> weight_size,
                    std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups) {
  const char* reason =
      checked_numbers(input_size, weight_size, stride, padding, dilation, groups, why_refused)
          .refusal;
  return reason ? reason : "";
}

int64_t conv2d_backward(const Tensor& grad_output, std::optional<Tensor> input,
                        std::optional<Tensor> weight, std::vector<int64_t> input_size,
                        std::vector<int64_t> weight_size, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        std::optional<Tensor> key, double tau, std::optional<Tensor> pruned,
                        std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight,
                        bool lists_only, std::optional<Tensor> taus) {
  sparsebwd::ConvBackward call = {};
  const sparsebwd::ConvProblem& problem = call.problem =
      checked_problem(input_size, weight_size, stride, padding, dilation, groups, why_refused);
  call.lists_only = lists_only;
  call.dtype = checked_dtype(grad_output, "grad_output");
  const std::vector<int64_t> output_size = {problem.n, problem.k, problem.p(), problem.q()};
  call.grad_output_planes =
      checked_activation(grad_output, "grad_output", grad_output, output_size);
  call.grad_output = grad_output.const_data_ptr();
  sparsebwd::PruneSpec spec;
  if (key) {
    spec = checked_prune_spec(*key, tau, call.dtype);
    call.prune = &spec;
    call.taus = checked_taus(taus, problem.n, call.dtype);
  }
  if (pruned) {
    check_alike(*pruned, "pruned", grad_output, "grad_output");
    call.pruned = pruned->mutable_data_ptr();
  }
  if (grad_input) {
    check(weight.has_value(), "weight: got None, accepted is a tensor if grad_input is wanted");
    call.grad_input_planes = checked_activation(*grad_input, "grad_input", grad_output, input_size);
    call.weight_strides = checked_weight(*weight, "weight", weight_size);
    call.weight_dtype = checked_dtype(*weight, "weight");
    call.weight = weight->const_data_ptr();
    call.grad_input = grad_input->mutable_data_ptr();
  }
  if (grad_weight) {
    check(input.has_value(), "input: got None, accepted is a tensor if grad_weight is wanted");
    call.input_planes = checked_activation(*input, "input", grad_output, input_size);
    call.grad_weight_strides = checked_weight(*grad_weight, "grad_weight", weight_size);
    call.grad_weight_dtype = checked_dtype(*grad_weight, "grad_weight");
    call.input = input->const_data_ptr();
    call.grad_weight = grad_weight->mutable_data_ptr();
  }
  const sparsebwd::IsaKernels& kernels = sparsebwd::active_kernels();
  return sparsebwd::conv_backward(kernels.conv, kernels.prune, task_pool(), call);
}

const char* why_depthwise_refused(const sparsebwd::ConvProblem& problem) {
  return sparsebwd::depthwise_refusal(problem);
}

// Why depthwise_backward does not take a problem; empty if it does.
std::string depthwise_refusal(std::vector<int64_t> input_size, std::vector<int64_t> weight_size,
                              std::vector<int64_t> stride, std::vector<int64_t> padding,
                              std::vector<int64_t> dilation, int64_t groups) {
  const char* reason = checked_numbers(input_size, weight_size, stride, padding, dilation, groups,
                                       why_depthwise_refused)
                           .refusal;
  return reason ? reason : "";
}

void depthwise_backward(const Tensor& grad_output, std::optional<Tensor> input,
                        std::optional<Tensor> weight, std::vector<int64_t> input_size,
                        std::vector<int64_t> weight_size, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation,
                        std::optional<Tensor> grad_input, std::optional<Tensor> grad_weight) {
  sparsebwd::DepthwiseBackward call = {};
  const int64_t groups = input_size.size() > 1 ? input_size[1] : 1;
  const sparsebwd::ConvProblem& problem = call.problem = checked_problem(
      input_size, weight_size, stride, padding, dilation, groups, why_depthwise_refused);
  call.dtype = checked_dtype(grad_output, "grad_output");
  const auto activation = [&](const Tensor& tensor, const char* name,
                              const std::vector<int64_t>& size) {
    const bool planes = checked_activation(tensor, name, grad_output, size, true);
    return sparsebwd::Activation{const_cast<void*>(tensor.const_data_ptr()), planes};
  };
  call.grad_output =
      activation(grad_output, "grad_output", {problem.n, problem.k, problem.p(), problem.q()});
  if (grad_input) {
    check(weight.has_value(), "weight: got None, accepted is a tensor if grad_input is wanted");
    call.grad_input = activation(*grad_input, "grad_input", input_size);
    call.weight_strides = checked_weight(*weight, "weight", weight_size);
    call.weight_dtype = checked_dtype(*weight, "weight");
    call.weight = weight->const_data_ptr();
  }
  if (grad_weight) {
    check(input.has_value(), "input: got None, accepted is a tensor if grad_weight is wanted");
    call.input = activation(*input, "input", input_size);
    call.grad_weight_strides = checked_weight(*grad_weight, "grad_weight", weight_size);
    call.grad_weight_dtype = checked_dtype(*grad_weight, "grad_weight");
    call.grad_weight = grad_weight->mutable_data_ptr();
  }
  sparsebwd::depthwise_backward(sparsebwd::active_kernels().depthwise, task_pool(), call);
}

}  // namespace

STABLE_TORCH_LIBRARY(sparsebwd_cpu, m) {
  m.def("why_no_cuda() -> str");
  m.def("isa() -> str");
  m.def("supported_isas() -> str[]");
  m.def("abs_sum(Tensor g) -> (float, int)");
  m.def("histogram(Tensor g, Tensor(a!) counts) -> ()");
  m.def("expected_density(Tensor g, float taus_per_mean) -> float");
  m.def("prune(Tensor g, Tensor key, float tau, Tensor(a!) out, Tensor? taus=None) -> int");
  m.def("copy_layout(Tensor src, Tensor(a!) out) -> ()");
  m.def(
      "refusal(int[] input_size, int[] weight_size, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> str");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor? input, Tensor? weight, int[] input_size, "
      "int[] weight_size, int[] stride, int[] padding, int[] dilation, int groups, Tensor? key, "
      "float tau, Tensor(a!)? pruned, Tensor(b!)? grad_input, Tensor(c!)? grad_weight, "
      "bool lists_only=False, Tensor? taus=None) -> int");
  m.def(
      "depthwise_refusal(int[] input_size, int[] weight_size, int[] stride, int[] padding, int[] "
      "dilation, "
      "int groups) -> str");
  m.def(
      "depthwise_backward(Tensor grad_output, Tensor? input, Tensor? weight, int[] input_size, "
      "int[] weight_size, int[] stride, int[] padding, int[] dilation, Tensor(a!)? grad_input, "
      "Tensor(b!)? grad_weight) -> ()");
}

// No key of a device: the checks above then say in words which devices are accepted.
STABLE_TORCH_LIBRARY_IMPL(sparsebwd_cpu, CompositeExplicitAutograd, m) {
  m.impl("why_no_cuda", TORCH_BOX(&why_no_cuda));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("supported_isas", TORCH_BOX(&supported_isas));
  m.impl("abs_sum", TORCH_BOX(&abs_sum));
  m.impl("histogram", TORCH_BOX(&histogram));
  m.impl("expected_density", TORCH_BOX(&expected_density));
  m.impl("prune", TORCH_BOX(&prune));
  m.impl("copy_layout", TORCH_BOX(&copy_layout));
  m.impl("refusal", TORCH_BOX(&refusal));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
  m.impl("depthwise_refusal", TORCH_BOX(&depthwise_refusal));
  m.impl("depthwise_backward", TORCH_BOX(&depthwise_backward));
}

// `import sparsebwd._C` loads this file, which registers the operators; the module is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
