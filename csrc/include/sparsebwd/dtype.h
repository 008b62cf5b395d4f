// SPDX-License-Identifier: Apache-2.0
// Element types that the kernels read and write, and their conversion to and from float32.
#pragma once

#include <stdint.h>
#include <string.h>

namespace sparsebwd {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

static inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline float float_of_bfloat16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one.
static inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace sparsebwd
