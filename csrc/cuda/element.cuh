// SPDX-License-Identifier: Apache-2.0
// The element types of tensors as kernels are written over them, and the choice of one at run time.
#pragma once

#include "device.cuh"
#include "sparsebwd/dtype.h"

namespace sparsebwd::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return float_of_bfloat16(value.bits); }
__device__ __forceinline__ float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return float_of_float16(value.bits);
#endif
}

// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return {bfloat16_of_float(value)};
#endif
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
#ifdef __CUDA_ARCH__
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return {float16_of_float(value)};
#endif
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>()) for the element type.
template <class F>
auto with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(Type<BFloat16>());
    case DType::kFloat16: return f(Type<Float16>());
    default: return f(Type<float>());
  }
}

}  // namespace sparsebwd::cuda
