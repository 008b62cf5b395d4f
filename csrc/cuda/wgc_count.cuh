// SPDX-License-Identifier: Apache-2.0
// What K3 (wgc.cu) does first: counts what each row of a strip costs, for each tile of output channels.
#pragma once

#include "wgc_form.cuh"

namespace sparsebwd::cuda {
namespace {

constexpr int kCountThreads = 256;
constexpr int kRowsOfBlock = kCountThreads / 32;

// Costs are [tile of output channels][strip][row]: those of non-zeros, and of pixels, each of which takes
// as long as if 3/8 of its channels were non-zeros more, by the model (tools/sass_model.py).
static __global__ void __launch_bounds__(kCountThreads)
    count_kernel(const Plan plan, const uint32_t* nonzeros, int32_t* costs) {
  const int64_t step = int64_t(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (step >= plan.steps()) return;
  const int64_t row = step % plan.rows;
  const int sequence = static_cast<int>(step / plan.rows), k_tile = sequence / plan.strips;
  const int q = sequence % plan.strips * plan.strip + static_cast<int>(threadIdx.x) % 32;
  const bool inside = static_cast<int>(threadIdx.x) % 32 < plan.strip && q < plan.q;
  const uint32_t mask = plan.tile_bits(k_tile, [&](int word) {
    return inside ? nonzeros[(row * plan.q + q) * plan.words() + word] : 0;
  });
  const uint32_t cost = __reduce_add_sync(~0u, __popc(mask) + (inside ? plan.tile_k * 3 / 8 : 0));
  if (threadIdx.x % 32 == 0) costs[step] = static_cast<int32_t>(cost);
}

}  // namespace
}  // namespace sparsebwd::cuda
