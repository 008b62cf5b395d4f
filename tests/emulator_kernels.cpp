// SPDX-License-Identifier: Apache-2.0
// Binds emulator_kernels.cu.
#include "emulator_kernels.h"

#include <pybind11/stl.h>

#include "bindings.h"

namespace {

namespace py = pybind11;
using namespace sparsebwd::cuda;

// `initialised`: whether kernels may read `out` before they have written it.
void run(const std::string& name, const std::array<unsigned, 3>& grid,
         const std::array<unsigned, 3>& block, size_t shared, bool cooperative,
         const py::object& in, const py::object& out, int n, bool initialised) {
  emulator::Operands operands;
  const void* input = operands.input<void>("in", in);
  void* output = operands.output<void>("out", out, initialised);
  operands.check(launch_test_kernel(name.c_str(), {grid[0], grid[1], grid[2]},
                                    {block[0], block[1], block[2]}, shared, cooperative, input,
                                    output, n));
}

}  // namespace

PYBIND11_MODULE(SPARSEBWD_MODULE, module) {
  emulator::bind_controls(module);
  module.def("run", &run);
  module.def("resident_blocks", [](int threads, size_t shared) {
    int blocks = 0;
    emulator::Operands().check(emulator::resident_blocks(threads, shared, &blocks));
    return blocks;
  });
}
