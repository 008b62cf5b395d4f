// SPDX-License-Identifier: Apache-2.0
// Cuts work into ranges of equal cost: the costs of its steps are known on the device only, as they
// are counts of non-zeros. A range depends on the data, and not on the order in which threads run.
#pragma once

#include "device.cuh"

namespace sparsebwd::cuda {

constexpr int kCutThreads = 1024;
constexpr int kCutShared = 32 * sizeof(int64_t);  // bytes of dynamic shared memory

// The sum of `value` over the threads before this one, and over all.
struct Scan {
  int64_t before, all;
};
__device__ __forceinline__ Scan scan_block(int64_t value) {
  auto* const of_warp = reinterpret_cast<int64_t*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto scan_warp = [lane](int64_t sum) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    return sum;
  };
  const int64_t inclusive = scan_warp(value);
  if (lane == 31) of_warp[warp] = inclusive;
  __syncthreads();
  const int64_t of_warps = scan_warp(of_warp[lane]);
  const int64_t before_warp = __shfl_sync(~0u, of_warps, (warp + 31) % 32);
  return {(warp == 0 ? 0 : before_warp) + inclusive - value, __shfl_sync(~0u, of_warps, 31)};
}

// `parts` + 1 cuts of a sequence of `steps` costs: range i is from cut i to cut i + 1. One block.
static __global__ void __launch_bounds__(kCutThreads)
    cut_kernel(const int32_t* costs, int steps, int parts, int32_t* cuts) {
  const int first = static_cast<int>(int64_t(steps) * threadIdx.x / kCutThreads);
  const int end = static_cast<int>(int64_t(steps) * (threadIdx.x + 1) / kCutThreads);
  int64_t sum = 0;
  for (int step = first; step < end; ++step) sum += costs[step];
  const Scan scan = scan_block(sum);
  // Cut i is before the first step until whose middle i / parts of the cost are done. Costs are doubled,
  // so that all are whole numbers, the same in whichever thread.
  const auto cuts_until = [&](int64_t middle) {
    return scan.all == 0 ? parts : static_cast<int>(middle * parts / (2 * scan.all));
  };
  int64_t done = 2 * scan.before;
  int next = first == 0 ? 0 : cuts_until(done - costs[first - 1]) + 1;
  for (int step = first; step < end; ++step) {
    const int64_t middle = done + costs[step];
    for (; next < parts && int64_t(next) * 2 * scan.all <= middle * parts; ++next)
      cuts[next] = step;
    done += 2 * costs[step];
  }
  if (threadIdx.x == kCutThreads - 1)
    for (; next <= parts; ++next) cuts[next] = steps;
}

}  // namespace sparsebwd::cuda
