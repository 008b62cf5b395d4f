// SPDX-License-Identifier: Apache-2.0
// The epilogue of K3 (wgc.cu): the sums of all pieces become the gradient of the weight.
#pragma once

#include "element.cuh"
#include "kernels.h"
#include "wgc_form.cuh"

namespace sparsebwd::cuda {
namespace {

constexpr int kReduceThreads = 256;

// How many parts, of all but the first, begin before this step.
__device__ __forceinline__ int parts_before(const Plan& plan, const int32_t* cuts, int step) {
  int count = 0;
  for (int first = 1; first < plan.parts; first += kReduceThreads) {
    const int part = first + static_cast<int>(threadIdx.x);
    count += __syncthreads_count(part < plan.parts && cuts[part] < step);
  }
  return count;
}

// The sums over the pieces of a tile, in the order of memory. Each thread takes one of `slices` equal
// shares of them, the threads of a share neighbouring sums; those of the first add up the others.
template <class K>
__global__ void __launch_bounds__(kReduceThreads)
    wgc_reduce(const Plan plan, int slices, const int32_t* cuts, const float* partials,
               typename K::T* result, const Strides strides) {
  const unsigned width = kReduceThreads / slices, slice = threadIdx.x / width;
  const unsigned blocks = K::kBlockSums / width;  // for a tile
  const unsigned tile = blockIdx.x / blocks;
  unsigned index = blockIdx.x % blocks * width + threadIdx.x % width;
  const int k_tile = tile % plan.k_tiles, c_tile = tile / plan.k_tiles;
  const auto first_piece = [&](int sequence) {
    return plan.piece(parts_before(plan, cuts, sequence * plan.rows), sequence);
  };
  const int64_t begin = first_piece(k_tile * plan.strips);
  const int64_t count = first_piece((k_tile + 1) * plan.strips) - begin;
  const float* const from = partials + (begin * plan.c_tiles + c_tile) * K::kBlockSums + index;
  const int64_t end = count * (slice + 1) / slices;
  double sum = 0;
#pragma unroll 4
  for (int64_t piece = count * slice / slices; piece < end; ++piece)
    sum += static_cast<double>(from[piece * plan.c_tiles * K::kBlockSums]);
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
  const int64_t k = k_tile * static_cast<int64_t>(K::kTileK) + index;
  const int64_t c = c_tile * static_cast<int64_t>(K::kTileC) +
                    (vector / K::kVector * 32 + owner) * K::kVector + vector % K::kVector + element;
  if (k < plan.k && c < plan.c)
    result[k * strides.n + c * strides.c + r * strides.h + s * strides.w] =
        from_float<typename K::T>(static_cast<float>(sum));
}

}  // namespace
}  // namespace sparsebwd::cuda
