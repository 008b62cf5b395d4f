// SPDX-License-Identifier: Apache-2.0
// Four float lanes in the compilers' vector extension: any machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include "sparsebwd/dtype.h"

namespace sparsebwd {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes v;

  static Vec zero() { return {Lanes{0, 0, 0, 0}}; }
  static Vec load(const float* p) {
    Vec result;
    memcpy(&result.v, p, sizeof(result.v));
    return result;
  }
  static Vec load_first(const float* p, int64_t count) {
    Vec result = zero();
    for (int64_t i = 0; i < count && i < kLanes; ++i) result.v[i] = p[i];
    return result;
  }
  // p[0], p[2] and so on.
  static Vec load_even(const float* p) { return {Lanes{p[0], p[2], p[4], p[6]}}; }
  static Vec load_even_first(const float* p, int64_t count) {
    Vec result = zero();
    for (int64_t i = 0; i < count && i < kLanes; ++i) result.v[i] = p[2 * i];
    return result;
  }
  static Vec broadcast(const float* p) { return {Lanes{*p, *p, *p, *p}}; }
  void store(float* p) const { memcpy(p, &v, sizeof(v)); }
  void store_first(float* p, int64_t count) const {
    for (int64_t i = 0; i < count && i < kLanes; ++i) p[i] = v[i];
  }
  void stream(float* p) const { store(p); }
  // bfloat16, rounded as bfloat16_of_float does.
  static Vec load(const uint16_t* p) {
    return {Lanes{float_of_bfloat16(p[0]), float_of_bfloat16(p[1]), float_of_bfloat16(p[2]),
                  float_of_bfloat16(p[3])}};
  }
  void store(uint16_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = bfloat16_of_float(v[i]);
  }
  static void finish_stores() {}
  Vec fma(Vec a, Vec b) const { return {v + a.v * b.v}; }
  Vec operator+(Vec o) const { return {v + o.v}; }
  // Of lane i, bit i.
  uint64_t nonzero() const {
    uint64_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint64_t>(v[i] != 0.0f) << i;
    return bits;
  }
};

// Four values, loaded at once.
struct Quad {
  Vec v;

  static Quad load(const float* p) { return {Vec::load(p)}; }
  template <int Lane>
  Vec broadcast() const {
    const float value = v.v[Lane];
    return Vec::broadcast(&value);
  }
};

// Byte offsets of kLanes operands.
struct Offsets {
  uint32_t lane[Vec::kLanes];

  static Offsets multiples(uint32_t step) { return {{0, step, 2 * step, 3 * step}}; }
  static Offsets load(const uint16_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  Offsets operator+(uint32_t base) const {
    return {{lane[0] + base, lane[1] + base, lane[2] + base, lane[3] + base}};
  }
};

// Appends the non-zero lanes of `v` and the offsets of those lanes to a list; returns their
// number. Both arrays must have room for kLanes more entries. Full: expect most to be non-zero.
template <bool Full>
inline int append_nonzero(Vec v, Offsets o, float* values, uint16_t* offsets) {
  int n = 0;
  for (int i = 0; i < Vec::kLanes; ++i) {
    values[n] = v.v[i];
    offsets[n] = static_cast<uint16_t>(o.lane[i]);
    n += v.v[i] != 0.0f;
  }
  return n;
}

// Transposes a kLanes x kLanes tile in place.
inline void transpose(Vec (&tile)[Vec::kLanes]) {
  for (int i = 0; i < Vec::kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = tile[i].v[j];
      tile[i].v[j] = tile[j].v[i];
      tile[j].v[i] = swapped;
    }
}

}  // namespace
}  // namespace sparsebwd
