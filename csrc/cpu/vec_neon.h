// SPDX-License-Identifier: Apache-2.0
// Eight float lanes, NEON of aarch64: two registers each, which makes 16 vectors of 32 registers.
#pragma once

#include <arm_neon.h>
#include <stdint.h>

namespace sparsebwd {
namespace {

// For every mask of four lanes, the bytes of its set lanes, in order: of lanes of 4 bytes and of 2.
struct CompressTable {
  alignas(16) uint8_t words[16][16];
  alignas(8) uint8_t halves[16][8];
  uint8_t count[16];

  constexpr CompressTable() : words(), halves(), count() {
    for (int mask = 0; mask < 16; ++mask) {
      int n = 0;
      for (int lane = 0; lane < 4; ++lane) {
        if (!(mask >> lane & 1)) continue;
        for (int byte = 0; byte < 4; ++byte)
          words[mask][4 * n + byte] = static_cast<uint8_t>(4 * lane + byte);
        for (int byte = 0; byte < 2; ++byte)
          halves[mask][2 * n + byte] = static_cast<uint8_t>(2 * lane + byte);
        ++n;
      }
      count[mask] = static_cast<uint8_t>(n);
    }
  }
};

constexpr CompressTable kCompressTable;

struct Vec {
  static constexpr int kLanes = 8;
  float32x4_t low, high;

  static Vec zero() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
  static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Vec load_first(const float* p, int64_t count) {
    return {first(p, count), first(p + 4, count - 4)};
  }
  // p[0], p[2] and so on; reads nothing behind the last one.
  static Vec load_even(const float* p) {
    const float32x4_t last = vld1q_f32(p + 11);  // its second and last lane
    return {vuzp1q_f32(vld1q_f32(p), vld1q_f32(p + 4)),
            vuzp1q_f32(vld1q_f32(p + 8), vextq_f32(last, last, 1))};
  }
  static Vec load_even_first(const float* p, int64_t count) {
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count && i < kLanes; ++i) lanes[i] = p[2 * i];
    return load(lanes);
  }
  static Vec broadcast(const float* p) {
    const float32x4_t v = vld1q_dup_f32(p);
    return {v, v};
  }
  void store(float* p) const {
    vst1q_f32(p, low);
    vst1q_f32(p + 4, high);
  }
  void store_first(float* p, int64_t count) const {
    float lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < count && i < kLanes; ++i) p[i] = lanes[i];
  }
  void stream(float* p) const { store(p); }
  // bfloat16, rounded as bfloat16_of_float does.
  static Vec load(const uint16_t* p) {
    const uint16x8_t bits = vld1q_u16(p);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
  }
  void store(uint16_t* p) const { vst1q_u16(p, vcombine_u16(rounded(low), rounded(high))); }
  static void finish_stores() {}
  Vec fma(Vec a, Vec b) const {
    return {vfmaq_f32(low, a.low, b.low), vfmaq_f32(high, a.high, b.high)};
  }
  Vec operator+(Vec o) const { return {vaddq_f32(low, o.low), vaddq_f32(high, o.high)}; }
  // Of lane i, bit i.
  uint64_t nonzero() const {
    const uint16x8_t zero = vcombine_u16(vmovn_u32(vceqzq_f32(low)), vmovn_u32(vceqzq_f32(high)));
    const uint16x8_t bits = {1, 2, 4, 8, 16, 32, 64, 128};
    return vaddvq_u16(vbicq_u16(bits, zero));
  }

 private:
  static float32x4_t first(const float* p, int64_t count) {
    if (count >= 4) return vld1q_f32(p);
    float32x4_t v = vdupq_n_f32(0.0f);
    if (count > 0) v = vld1q_lane_f32(p, v, 0);
    if (count > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (count > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
  }
  static uint16x4_t rounded(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t nearest =
        vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    const uint16x4_t quiet = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
    return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), nearest, quiet);
  }
};

// Four values, loaded at once: a broadcast from memory for each would take a load slot that the
// multiply-adds need.
struct Quad {
  float32x4_t v;

  static Quad load(const float* p) { return {vld1q_f32(p)}; }
  template <int Lane>
  Vec broadcast() const {
    const float32x4_t lane = vdupq_laneq_f32(v, Lane);
    return {lane, lane};
  }
};

// Byte offsets of kLanes operands; those of lanes that hold anything fit 16 bits.
struct Offsets {
  uint16x8_t v;

  static Offsets multiples(uint32_t step) {
    const uint16x8_t lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    return {vmulq_n_u16(lanes, static_cast<uint16_t>(step))};
  }
  static Offsets load(const uint16_t* p) { return {vld1q_u16(p)}; }
  Offsets operator+(uint32_t base) const {
    return {vaddq_u16(v, vdupq_n_u16(static_cast<uint16_t>(base)))};
  }
};

// Appends the non-zero lanes of `v` and the offsets of those lanes to a list; returns their
// number. Both arrays must have room for kLanes more entries. Full: expect most to be non-zero.
template <bool Full>
inline int append_nonzero(Vec v, Offsets o, float* values, uint16_t* offsets) {
  int n = 0;
  const auto append = [&](float32x4_t half, uint16x4_t at,
                          uint64_t keep) __attribute__((always_inline)) {
    const uint8x16_t bytes =
        vqtbl1q_u8(vreinterpretq_u8_f32(half), vld1q_u8(kCompressTable.words[keep]));
    vst1q_f32(values + n, vreinterpretq_f32_u8(bytes));
    const uint8x8_t kept = vtbl1_u8(vreinterpret_u8_u16(at), vld1_u8(kCompressTable.halves[keep]));
    vst1_u16(offsets + n, vreinterpret_u16_u8(kept));
    n += kCompressTable.count[keep];
  };
  const uint64_t keep = v.nonzero();
  append(v.low, vget_low_u16(o.v), keep & 15);
  append(v.high, vget_high_u16(o.v), keep >> 4);
  return n;
}

// Transposes four rows of four.
inline void transpose(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const auto pairs = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
  const auto lanes = [](float64x2_t x) { return vreinterpretq_f32_f64(x); };
  const float64x2_t ab_even = pairs(vtrn1q_f32(a, b)), ab_odd = pairs(vtrn2q_f32(a, b));
  const float64x2_t cd_even = pairs(vtrn1q_f32(c, d)), cd_odd = pairs(vtrn2q_f32(c, d));
  a = lanes(vtrn1q_f64(ab_even, cd_even));
  b = lanes(vtrn1q_f64(ab_odd, cd_odd));
  c = lanes(vtrn2q_f64(ab_even, cd_even));
  d = lanes(vtrn2q_f64(ab_odd, cd_odd));
}

// Transposes a kLanes x kLanes tile in place.
inline void transpose(Vec (&tile)[Vec::kLanes]) {
  for (int i = 0; i < Vec::kLanes; i += 4) {
    transpose(tile[i].low, tile[i + 1].low, tile[i + 2].low, tile[i + 3].low);
    transpose(tile[i].high, tile[i + 1].high, tile[i + 2].high, tile[i + 3].high);
  }
  for (int i = 0; i < 4; ++i) {
    const float32x4_t moved = tile[i].high;
    tile[i].high = tile[i + 4].low;
    tile[i + 4].low = moved;
  }
}

}  // namespace
}  // namespace sparsebwd
