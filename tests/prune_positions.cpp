// SPDX-License-Identifier: Apache-2.0
// Where csrc/cuda/prune.cu takes packs to be, for test_cuda_prune.py: no kernel runs, so that the
// tensor may be larger than any memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "prune.cu"

namespace {

using namespace sparsebwd;
using namespace sparsebwd::cuda;

// Digits, offset and how much of the pack there is; found `rows` (-1, 0, 1) steps from there.
template <class View>
std::vector<int64_t> place(const std::array<int64_t, 4>& shape, bool channels_last, bool nonzeros,
                           int64_t pack, int rows) {
  const PruneShape of_tensor = {shape[0], shape[1], shape[2], shape[3], channels_last};
  const Geometry geometry = geometry_of<View>(of_tensor, nonzeros);
  Position position = position_of(pack - rows * kThreads, View::kStep, geometry);
  if (rows > 0) move(position, geometry.forward, geometry);
  if (rows < 0) move(position, geometry.backward, geometry);
  std::vector<int64_t> result(position.digit, position.digit + 4);
  result.push_back(View::offset(position, geometry));
  result.push_back(View::present(position, geometry));
  return result;
}

}  // namespace

PYBIND11_MODULE(SPARSEBWD_MODULE, module) {
  module.def("channels_last", &place<ChannelsLast<BFloat16, true>>);
  module.def("channels_last_quads", &place<ChannelsLast<float, false>>);
  module.def("contiguous", &place<Contiguous<float, true>>);
  module.def("contiguous_pixels", &place<Contiguous<BFloat16, false>>);
}
