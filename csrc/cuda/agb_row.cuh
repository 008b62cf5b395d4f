// SPDX-License-Identifier: Apache-2.0
// The main loop of K2 (agb.cu): what a row of gradients adds to the sums of a strip.
#pragma once

#include "agb_form.cuh"
#include "element.cuh"

namespace sparsebwd::cuda {
namespace {

// Weights of a lane from an address in global memory: those of the other lanes lie between its vectors.
template <int Vector, int Count>
__device__ __forceinline__ void load_global(float (&values)[Count], uint64_t address) {
#pragma unroll
  for (int i = 0; i < Count; i += Vector) {
    if constexpr (Vector == 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(address) + i / Vector * 32);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    } else {
      const float2 two = __ldg(reinterpret_cast<const float2*>(address) + i / Vector * 32);
      values[i] = two.x, values[i + 1] = two.y;
    }
  }
}

template <int Count>
__device__ __forceinline__ void load_shared(float (&values)[Count], const float* from) {
#pragma unroll
  for (int i = 0; i < Count; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
  }
}

// Adds g, pixel j of the strip, times the filter.
template <class F>
__device__ __forceinline__ void add_product(typename F::Sums& sums,
                                            const float (&weights)[F::kWeights], float g, int j) {
#pragma unroll
  for (int r = 0; r < F::kTaps; ++r) {
#pragma unroll
    for (int s = 0; s < F::kTaps; ++s) {
      const int column = F::kStride * j - F::kOffset + s;
      if (column < 0 || column >= F::kColumns) continue;
#pragma unroll
      for (int i = 0; i < F::kLane; ++i) {
        float& sum = sums[r][column][i];
        sum = fmaf(g, weights[(r * F::kTaps + s) * F::kLane + i], sum);
      }
    }
  }
}

// How many products that are.
template <class F>
constexpr int products(int j) {
  int count = 0;
  for (int s = 0; s < F::kTaps; ++s) {
    const int column = F::kStride * j - F::kOffset + s;
    if (column >= 0 && column < F::kColumns) count += F::kTaps * F::kLane;
  }
  return count;
}

// Adds to `sums` what a row of gradients gives, of the words of k that are this warp's, from `word` on, until sums are
// long. `packed`: weights of the tile of channels, this lane's. `here`: index of the gradient pixel of this lane, below 0 if there is none.
// `values`: of a pixel, at most, that were multiplied since sums were put aside. Returns the next word.
template <class F>
__device__ __forceinline__ int add_row(typename F::Sums& sums, const Plan& plan,
                                       const typename F::T* __restrict__ grad_output,
                                       const uint32_t* __restrict__ nonzeros,
                                       const float* __restrict__ packed, float* shared, int word,
                                       int here, int& values) {
  using T = typename F::T;
  const int lane = threadIdx.x % 32;
  const auto load = [&](int word) -> uint32_t {
    return here < 0 || word >= plan.words ? 0 : nonzeros[int64_t(here) * plan.words + word];
  };
  uint32_t next = load(word);
  for (; word < plan.words && values < kChain; word += plan.sharers) {
    const uint32_t bits = next;  // lane = pixel, bit = k
    next = load(word + plan.sharers);
    const char* first = reinterpret_cast<const char*>(grad_output + word * 32 + lane);
    float value[F::kValues] = {};  // lane = k
#pragma unroll
    for (int j = 0; j < F::kPixels; ++j) {
      const uint32_t of_pixel = __shfl_sync(kAll, bits, j);
      const uint32_t from = __shfl_sync(kAll, here, j);
      if (of_pixel >> lane & 1)
        value[j] = to_float(*reinterpret_cast<const T*>(first + uint64_t(from) * plan.pixel_bytes));
    }
    values += __reduce_max_sync(kAll, __popc(bits));
    __syncwarp();  // all have read what is overwritten now
#pragma unroll
    for (int j = 0; j < F::kPixels; j += 4)
      *reinterpret_cast<float4*>(shared + lane * F::kValues + j) =
          float4{value[j], value[j + 1], value[j + 2], value[j + 3]};
    __syncwarp();
    // An address, so that one multiplication with addition gives that of each k.
    const auto of_word = in_register(reinterpret_cast<uint64_t>(packed) +
                                     uint64_t(word) * uint32_t(32 * F::kPack * sizeof(float)));
    uint32_t left = __reduce_or_sync(kAll, bits);
    int k = __ffs(left) - 1;  // of the lowest bit; found early, as it takes its time
    while (left != 0) {
      const uint32_t bit = left & -left;
      left ^= bit;
      const uint32_t pixels = __ballot_sync(kAll, (bits & bit) != 0);
      float weights[F::kWeights];
      load_global<F::kVector>(weights, of_word + uint64_t(k) * uint32_t(F::kPack * sizeof(float)));
      // The same for all lanes: each vector is fetched once for all of them.
      float g[F::kValues];
      load_shared(g, shared + k * F::kValues);
      k = __ffs(left) - 1;
#pragma unroll
      for (int group = 0; group < F::kPixels; group += kGroup) {
        if ((pixels >> group & ((1u << kGroup) - 1)) == 0) continue;
#pragma unroll
        for (int j = group; j < group + kGroup && j < F::kPixels; ++j) {
          if (pixels >> j & 1) {
            // Where multiply-adds are few, compilers put a predicate on each, unless there is a barrier.
            if (products<F>(j) < F::kTaps * F::kTaps * F::kLane) __syncwarp();
            add_product<F>(sums, weights, g[j], j);
          }
        }
      }
    }
  }
  return word;
}

}  // namespace
}  // namespace sparsebwd::cuda
