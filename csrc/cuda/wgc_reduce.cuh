// SPDX-License-Identifier: Apache-2.0
// The epilogue of K3 (wgc.cu): the sums of all ranges become the gradient of the weight.
#pragma once

#include "element.cuh"
#include "kernels.h"
#include "wgc_form.cuh"

namespace sparsebwd::cuda {
namespace {

constexpr int kReduceThreads = 256;

// The sums over ranges, in the order of memory. Each thread takes one of the `slices` parts of the
// ranges, the threads of a part neighbouring sums; the first part adds up the others.
template <class K>
__global__ void __launch_bounds__(kReduceThreads)
    wgc_reduce(const Plan plan, int slices, const float* partials, typename K::T* result,
               const Strides strides) {
  const unsigned width = kReduceThreads / slices, slice = threadIdx.x / width;
  const unsigned blocks = K::kBlockSums / width;  // for a tile
  const unsigned tile = blockIdx.x / blocks;
  unsigned index = blockIdx.x % blocks * width + threadIdx.x % width;
  const float* const from = partials + static_cast<int64_t>(tile) * K::kBlockSums + index;
  const int64_t range_sums = static_cast<int64_t>(plan.c_tiles) * plan.k_tiles * K::kBlockSums;
  const int64_t end = plan.ranges() * (slice + 1) / slices;
  double sum = 0;
#pragma unroll 4
  for (int64_t range = plan.ranges() * slice / slices; range < end; ++range)
    sum += static_cast<double>(from[range * range_sums]);
  double* const parts = reinterpret_cast<double*>(dynamic_shared());
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0) return;
  for (int i = 1; i < slices; ++i) sum += parts[i * width + threadIdx.x];

  // Where it belongs: index is [warp][k][r][s][vector of a lane][lane][element].
  const auto next = [&](unsigned size) {
    const int digit = static_cast<int>(index % size);
    index /= size;
    return digit;
  };
  const int element = next(K::kStore), owner = next(32);
  const int vector = next(K::kLane / K::kStore) * K::kStore;
  const int s = next(K::kTaps), r = next(K::kTaps);
  const int64_t k = tile % plan.k_tiles * static_cast<int64_t>(K::kTileK) + index;
  const int64_t c = tile / plan.k_tiles * static_cast<int64_t>(K::kTileC) +
                    (vector / K::kVector * 32 + owner) * K::kVector + vector % K::kVector + element;
  if (k < plan.k && c < plan.c)
    result[k * strides.n + c * strides.c + r * strides.h + s * strides.w] =
        from_float<typename K::T>(static_cast<float>(sum));
}

}  // namespace
}  // namespace sparsebwd::cuda
