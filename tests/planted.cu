// SPDX-License-Identifier: Apache-2.0
// Kernels with the faults that test_cuda_compile.py looks for in ours, and their cures.
#include "device.cuh"

namespace sparsebwd::cuda {
namespace {

constexpr int kCases = 8;    // elements of a run, each with sums of its own
constexpr int kOperands = 6;  // values that one of them is multiplied by
constexpr int kThreads = 256;

__device__ __forceinline__ void multiply_add(float (&sums)[kOperands], float value,
                                             const float (&operand)[kOperands]) {
#pragma unroll
  for (int j = 0; j < kOperands; ++j) sums[j] = fmaf(value, operand[j], sums[j]);
}

// The compiler makes one straight line of it: every multiply-add is issued, of zeros too.
struct Guarded {
  static __device__ void add(float (&sums)[kCases][kOperands], const float* values, uint32_t mask,
                             const float (&operand)[kOperands]) {
#pragma unroll
    for (int i = 0; i < kCases; ++i) {
      if (mask >> i & 1) multiply_add(sums[i], values[i], operand);
    }
  }
};

// Zeros are multiplied.
struct Selected {
  static __device__ void add(float (&sums)[kCases][kOperands], const float* values, uint32_t mask,
                             const float (&operand)[kOperands]) {
#pragma unroll
    for (int i = 0; i < kCases; ++i)
      multiply_add(sums[i], mask >> i & 1 ? values[i] : 0.0f, operand);
  }
};

// Only what is there costs anything.
struct Branched {
  static __device__ void add(float (&sums)[kCases][kOperands], const float* values, uint32_t mask,
                             const float (&operand)[kOperands]) {
    for (; mask != 0; mask &= mask - 1) {
      const int i = __ffs(static_cast<int>(mask)) - 1;
      const float value = values[i];
      switch (i) {
        case 0: multiply_add(sums[0], value, operand); break;
        case 1: multiply_add(sums[1], value, operand); break;
        case 2: multiply_add(sums[2], value, operand); break;
        case 3: multiply_add(sums[3], value, operand); break;
        case 4: multiply_add(sums[4], value, operand); break;
        case 5: multiply_add(sums[5], value, operand); break;
        case 6: multiply_add(sums[6], value, operand); break;
        case 7: multiply_add(sums[7], value, operand); break;
      }
    }
  }
};

template <class Form>
__device__ __forceinline__ void convolve(const float* g, const uint32_t* masks, const float* x,
                                         float* result, int count) {
  float sums[kCases][kOperands] = {};
  for (int i = 0; i < count; ++i) {
    float operand[kOperands];
#pragma unroll
    for (int j = 0; j < kOperands; ++j)
      operand[j] = x[(i * kOperands + j) * kThreads + threadIdx.x];
    Form::add(sums, g + i * kCases, masks[i], operand);
  }
#pragma unroll
  for (int i = 0; i < kCases; ++i) {
#pragma unroll
    for (int j = 0; j < kOperands; ++j) {
      result[(i * kOperands + j) * kThreads + threadIdx.x] = sums[i][j];
    }
  }
}

}  // namespace

template <class Form>
__global__ void __launch_bounds__(kThreads, 2)
    convolution(const float* g, const uint32_t* masks, const float* x, float* result, int count) {
  convolve<Form>(g, masks, x, result, count);
}
template __global__ void convolution<Guarded>(const float*, const uint32_t*, const float*, float*,
                                              int);
template __global__ void convolution<Selected>(const float*, const uint32_t*, const float*, float*,
                                               int);
template __global__ void convolution<Branched>(const float*, const uint32_t*, const float*, float*,
                                               int);

// 32 registers are too few for 48 sums.
__global__ void __launch_bounds__(1024, 2)
    spilling(const float* g, const uint32_t* masks, const float* x, float* result, int count) {
  convolve<Branched>(g, masks, x, result, count);
}

// Registers have no index: the array is in memory.
__global__ void __launch_bounds__(kThreads, 2)
    indexed(const int* places, const float* values, float* result, int count) {
  float sums[16] = {};
  for (int i = 0; i < count; ++i) sums[places[i] & 15] += values[i];
  for (int i = 0; i < 16; ++i) result[threadIdx.x * 16 + i] = sums[i];
}

__global__ void unbounded(float* result) { result[threadIdx.x] = 0; }

// A product and a sum where a fused multiply-add is meant.
__global__ void __launch_bounds__(kThreads, 2)
    unfused(const float* a, const float* b, float* result, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += a[i] * b[i];
  result[threadIdx.x] = sum;
}

// Four loads of 4 bytes, and one of 16.
__global__ void __launch_bounds__(kThreads, 2) narrow(const float* values, float* result) {
  const float* mine = values + 4 * threadIdx.x;
  result[threadIdx.x] = mine[0] + mine[1] + mine[2] + mine[3];
}
__global__ void __launch_bounds__(kThreads, 2) wide(const float4* values, float* result) {
  const float4 mine = values[threadIdx.x];
  result[threadIdx.x] = mine.x + mine.y + mine.z + mine.w;
}

}  // namespace sparsebwd::cuda
