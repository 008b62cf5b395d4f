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
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
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

// Two 16-bit elements in a word, `low` in its low half, rounded toward zero.
template <class T>
__device__ __forceinline__ uint32_t pair_toward_zero(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair_toward_zero<BFloat16>(float low, float high) {
  return __byte_perm(float_bits(low), float_bits(high), 0x7632);
}
template <>
__device__ __forceinline__ uint32_t pair_toward_zero<Float16>(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  const auto half = [](float value) -> uint32_t {
    const uint16_t nearest = float16_of_float(value);
    return nearest - (fabsf(float_of_float16(nearest)) > fabsf(value));
  };
  return half(high) << 16 | half(low);
#endif
}

// For each half of a word all ones if its highest bit is set, else zeros.
__device__ __forceinline__ uint32_t masks_of_halves(uint32_t word) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(result) : "r"(word));
  return result;
#else
  return (word >> 15 & 0x10001u) * 0xFFFFu;
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
