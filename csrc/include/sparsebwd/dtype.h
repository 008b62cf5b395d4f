// SPDX-License-Identifier: Apache-2.0
// Element types that the kernels read and write, and their conversion to and from float32.
#pragma once

#include <stdint.h>
#include <string.h>

#include "sparsebwd/host_device.h"

namespace sparsebwd {

// The CPU kernels take float32 and bfloat16 only.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

static inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

SPARSEBWD_HOST_DEVICE static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

SPARSEBWD_HOST_DEVICE static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

SPARSEBWD_HOST_DEVICE static inline float float_of_bfloat16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
SPARSEBWD_HOST_DEVICE static inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Exact, subnormals included.
SPARSEBWD_HOST_DEVICE static inline float float_of_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, fraction = half & 1023u;
  if (exponent == 31) return float_of_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return float_of_bits(float_bits(magnitude) | sign);
  }
  return float_of_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

// Rounds to nearest, ties to even; what is too large becomes infinity, a NaN stays one.
SPARSEBWD_HOST_DEVICE static inline uint16_t float16_of_float(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u)
    return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 1023u));
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    // Adding 0.5 leaves the multiple in the low bits of the fraction, rounded by the addition.
    const float rounded = float_of_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(rounded) - 0x3F000000u));
  }
  const uint32_t rebased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | ((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13));
}

}  // namespace sparsebwd
