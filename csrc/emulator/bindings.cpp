// SPDX-License-Identifier: Apache-2.0
// kernels.h for Python, over NumPy arrays; tests/emulation.py has the friendly form. Elements of 16
// bits come as integers, and so `dtype`, a DType, says what they are.
#include "bindings.h"

#include <pybind11/stl.h>

#include "kernels.h"

namespace {

namespace py = pybind11;
using namespace sparsebwd;
using namespace sparsebwd::cuda;
using emulator::Operands;

Device emulated() {
  const emulator::Limits& limits = emulator::device();
  return {limits.multiprocessors, limits.shared_per_block, limits.shared_per_multiprocessor,
          limits.cooperative};
}

// n, c, h, w, k, r, s, stride, padding, dilation (two each), groups.
using Problem = std::array<int64_t, 14>;
ConvProblem problem_of(const Problem& p) {
  return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13]};
}

Strides strides_of(const py::array& array) {
  if (array.ndim() != 4)
    throw std::invalid_argument("an operand of a convolution has 4 dimensions");
  const auto stride = [&](int i) {
    return static_cast<int64_t>(array.strides(i) / array.itemsize());
  };
  return {stride(0), stride(1), stride(2), stride(3)};
}

void run_prune(const py::array& g, int dtype, const std::array<int64_t, 4>& shape,
               bool channels_last, const py::object& key, double sigma_coefficient, double quantile,
               const py::object& sigma_history, const py::object& scales, const py::object& out,
               const py::object& nonzeros, const py::array& stats) {
  Operands operands;
  Pruning pruning = {};
  PruneCall call = {};
  call.g = operands.input<void>("g", g);
  call.dtype = static_cast<DType>(dtype);
  call.shape = {shape[0], shape[1], shape[2], shape[3], channels_last};
  if (!key.is_none()) {
    pruning.key = operands.input<int64_t>("key", key);
    pruning.sigma_coefficient = sigma_coefficient;
    pruning.quantile = quantile;
    pruning.sigma_history = operands.output<int32_t>("sigma_history", sigma_history, true);
    pruning.scales = operands.input<float>("scales", scales);
    call.pruning = &pruning;
  }
  call.out = operands.output<void>("out", out);
  call.nonzeros = operands.output<uint32_t>("nonzeros", nonzeros);
  call.stats = operands.output<float>("stats", stats);
  const Device device = emulated();
  call.workspace = operands.workspace(prune_workspace(call, device));
  operands.check(cuda::prune(call, device, nullptr));
}

template <size_t (*Workspace)(const ConvCall&, const Device&),
          cudaError_t (*Run)(const ConvCall&, const Device&, cudaStream_t)>
void run_convolution(const Problem& problem, int dtype, const py::array& grad_output,
                     const py::object& nonzeros, const py::array& operand,
                     const py::array& result) {
  Operands operands;
  ConvCall call = {};
  call.problem = problem_of(problem);
  call.dtype = static_cast<DType>(dtype);
  call.grad_output = operands.input<void>("grad_output", grad_output);
  call.grad_output_strides = strides_of(grad_output);
  call.nonzeros = operands.input<uint32_t>("nonzeros", nonzeros);
  call.operand = operands.input<void>("operand", operand);
  call.operand_strides = strides_of(operand);
  call.result = operands.output<void>("result", result);
  call.result_strides = strides_of(result);
  const Device device = emulated();
  call.workspace = operands.workspace(Workspace(call, device));
  operands.check(Run(call, device, nullptr));
}

template <const char* (*Refusal)(const ConvProblem&, DType)>
const char* refusal(const Problem& problem, int dtype) {
  return Refusal(problem_of(problem), static_cast<DType>(dtype));
}

}  // namespace

PYBIND11_MODULE(SPARSEBWD_MODULE, module) {
  emulator::bind_controls(module);
  module.def("prune", &run_prune);
  module.def("agb", &run_convolution<agb_workspace, agb>);
  module.def("wgc", &run_convolution<wgc_workspace, wgc>);
  module.def("agb_refusal", &refusal<agb_refusal>);
  module.def("wgc_refusal", &refusal<wgc_refusal>);
}
