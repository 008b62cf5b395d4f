// SPDX-License-Identifier: Apache-2.0
// What K2 (agb.cu) does first: packs the weights as its warps read them, and counts what each step costs.
#pragma once

#include "agb_form.cuh"
#include "element.cuh"
#include "kernels.h"
#include "sparsebwd/integers.h"

namespace sparsebwd::cuda {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int kStepsOfBlock = kPrepareThreads / 32;

// Weights are packed as float32 [tile of channels][k][...]: the kWeights of each lane, tap by tap, in
// vectors, those of neighbouring lanes side by side, so that a warp loads whole lines.
template <class F>
__device__ __forceinline__ void pack(const Plan& plan, const typename F::T* weight,
                                     const Strides& strides, float* packed, int64_t index) {
  const int place = static_cast<int>(index % F::kPack);
  const int lane = place / F::kVector % 32;
  const int which = place / (32 * F::kVector) * F::kVector + place % F::kVector;
  const int64_t row = index / F::kPack, k = row % plan.k, tile = row / plan.k;
  const int64_t c = tile * F::kChannels + which % F::kLane * 32 + lane;
  const int tap = which / F::kLane, r = tap / F::kTaps, s = tap % F::kTaps;
  packed[index] =
      c < plan.c ? to_float(weight[k * strides.n + c * strides.c + r * strides.h + s * strides.w])
                 : 0.0f;
}

// The cost of a step: that of its non-zeros, and of its channels, each of which takes as long as two.
template <class F>
__device__ __forceinline__ void count(const Plan& plan, const uint32_t* nonzeros, int32_t* costs,
                                      int step) {
  constexpr int kOwn =
      F::kColumns / F::kStride;  // pixels of grad_output that no other strip counts
  const int lane = threadIdx.x % 32;
  const int strip = step / plan.strip_steps, p = step - strip * plan.strip_steps;
  uint32_t count = 0;
  for (int i = lane; p < plan.p && i < kOwn * plan.words; i += 32) {
    const int pixel = strip * kOwn + i / plan.words;
    const int n = pixel / plan.image_pixels, q = pixel - n * plan.image_pixels;
    if (n < plan.n && q < plan.q)
      count +=
          __popc(nonzeros[(int64_t(n * plan.p + p) * plan.q + q) * plan.words + i % plan.words]);
  }
  const int shift = plan.k > 1 << 20 ? 8 : 0;  // sums have 32 bits
  const uint32_t all = __reduce_add_sync(~0u, count >> shift);
  if (lane == 0) costs[step] = static_cast<int32_t>(all + (plan.k >> shift) * 2u + 8u);
}

// The first blocks pack `packed_floats` weights, the others count.
template <class F>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(Plan plan, const typename F::T* weight, Strides strides, float* packed,
                   int64_t packed_floats, const uint32_t* nonzeros, int32_t* costs) {
  const int64_t index = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  const int64_t packing = ceil_div(packed_floats, kPrepareThreads) * kPrepareThreads;
  if (index < packing) {
    if (index < packed_floats) pack<F>(plan, weight, strides, packed, index);
  } else if (const int64_t step = (index - packing) / 32; step < plan.steps) {
    count<F>(plan, nonzeros, costs, static_cast<int>(step));
  }
}

}  // namespace
}  // namespace sparsebwd::cuda
