// SPDX-License-Identifier: Apache-2.0
// The epilogue of K2 (agb.cu): sums that are put aside, rows that are complete.
#pragma once

#include "agb_form.cuh"
#include "element.cuh"

namespace sparsebwd::cuda {
namespace {

// Whether a column receives anything.
template <class F>
constexpr bool receives(int column) {
  return F::kTaps >= F::kStride || column % F::kStride == 0;
}

// Adds a row of sums and, if there is Any, that which the warp has put aside. The total goes Back to
// the registers, or is put aside while they start from zero.
template <class F, bool Any, bool Back>
__device__ __forceinline__ void exchange(float (&sums)[F::kColumns][F::kLane], float* aside) {
  auto* const at = reinterpret_cast<typename F::Store*>(aside) + threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < F::kColumns; ++column) {
    if (!receives<F>(column)) continue;
#pragma unroll
    for (int i = 0; i < F::kLane; i += F::kStore) {
      typename F::Store& stored = at[(column * F::kLane + i) / F::kStore * 32];
      typename F::Store sum;
#pragma unroll
      for (int e = 0; e < F::kStore; ++e) sum.sum[e] = sums[column][i + e];
      if (Any) {
        const typename F::Store old = stored;
#pragma unroll
        for (int e = 0; e < F::kStore; ++e) sum.sum[e] += old.sum[e];
      }
#pragma unroll
      for (int e = 0; e < F::kStore; ++e) sums[column][i + e] = Back ? sum.sum[e] : 0.0f;
      if (!Back) stored = sum;
    }
  }
}

}  // namespace
}  // namespace sparsebwd::cuda
