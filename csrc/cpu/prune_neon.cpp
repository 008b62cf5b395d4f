// SPDX-License-Identifier: Apache-2.0
// Pruning kernels, NEON of aarch64.
#include <arm_neon.h>
#include <stddef.h>
#include <string.h>

#include "prune_kernels.h"

namespace sparsebwd {
namespace {

using Floats = float32x4_t;
using Words = uint32x4_t;
using Doubles = float64x2_t;
using Counters = uint64x2_t;
constexpr int kLanes = 4;

// Numbers of the lanes of a Counters vector; and the order of them that unpack_low and unpack_high
// undo.
constexpr uint64_t kLaneNumbers[] = {0, 1};
constexpr uint64_t kUnpackOrder[] = {0, 1};

inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats v) { vst1q_f32(p, v); }

inline Floats load(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline void store(uint16_t* p, Floats v) { vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(v), 16)); }

// 2 * kLanes bfloat16, those of even and those of odd index.
inline void load_even_odd(const uint16_t* p, Floats& even, Floats& odd) {
  const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(p));
  even = vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
  odd = vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xFFFF0000u)));
}
inline void store_even_odd(uint16_t* p, Floats even, Floats odd) {
  const uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_f32(even), 16);
  vst1q_u16(p, vreinterpretq_u16_u32(vorrq_u32(low, vreinterpretq_u32_f32(odd))));
}
// Stores even[0], odd[0], even[1], odd[1] and so on.
inline void store_zipped(float* p, Floats even, Floats odd) {
  store(p, vzip1q_f32(even, odd));
  store(p + kLanes, vzip2q_f32(even, odd));
}

inline Counters broadcast_counter(uint64_t x) { return vdupq_n_u64(x); }
inline Counters load_counters(const uint64_t* p) { return vld1q_u64(p); }
inline void store(uint64_t* p, Counters a) { vst1q_u64(p, a); }
inline Counters add(Counters a, Counters b) { return vaddq_u64(a, b); }
inline Counters multiply(Counters a, Counters b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline Counters high(Counters a) { return vshrq_n_u64(a, 32); }
inline Counters xor2(Counters a, Counters b) { return veorq_u64(a, b); }
inline Counters xor3(Counters a, Counters b, Counters c) { return xor2(a, xor2(b, c)); }
// Where inner >= width: inner - width, and one more outer.
inline void carry(Counters& inner, Counters& outer, Counters width) {
  const uint64x2_t over = vcgeq_u64(inner, width);
  inner = vsubq_u64(inner, vandq_u64(over, width));
  outer = vsubq_u64(outer, over);
}

// Low words of a in the even lanes, of b in the odd ones.
inline Counters interleave(Counters a, Counters b) {
  return vreinterpretq_u64_u32(vtrn1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
}
inline Words words_of(Counters a) { return vreinterpretq_u32_u64(a); }
inline Words unpack_low(Counters a, Counters b) { return words_of(vtrn1q_u64(a, b)); }
inline Words unpack_high(Counters a, Counters b) { return words_of(vtrn2q_u64(a, b)); }

inline Words zero_words() { return vdupq_n_u32(0); }
inline int64_t sum(Words a) { return static_cast<int64_t>(vaddlvq_u32(a)); }

inline Floats broadcast_float(float x) { return vdupq_n_f32(x); }
inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats absolute(Floats a) { return vabsq_f32(a); }

// The high 24 bits of each word: uniform on [0, 1) in units of kRandomUnit.
constexpr float kRandomUnit = 0x1p-24f;
inline Floats random_bits(Words words) { return vcvtq_f32_u32(vshrq_n_u32(words, 8)); }

// copysign(max(|g|, tau), g) where |g| > t or g is a NaN, else +0.
inline Floats keep_above(Floats g, Floats t, Floats tau, Words& nonzeros) {
  const Floats magnitude = vabsq_f32(g);
  const Words drop = vcleq_f32(magnitude, t);
  nonzeros = vsubq_u32(nonzeros, vmvnq_u32(drop));
  // Not vmaxq_f32, which changes NaNs.
  const Floats raised = vbslq_f32(vcltq_f32(magnitude, tau), tau, magnitude);
  const Words result = vreinterpretq_u32_f32(vbslq_f32(vdupq_n_u32(0x80000000u), g, raised));
  return vreinterpretq_f32_u32(vbicq_u32(result, drop));
}

inline void count_nonzeros(Floats a, Words& nonzeros) {
  nonzeros = vsubq_u32(nonzeros, vmvnq_u32(vceqzq_f32(a)));
}

inline Doubles zero_doubles() { return vdupq_n_f64(0.0); }
inline Doubles add(Doubles a, Doubles b) { return vaddq_f64(a, b); }
inline Doubles widen_low(Floats a) { return vcvt_f64_f32(vget_low_f32(a)); }
inline Doubles widen_high(Floats a) { return vcvt_high_f64_f32(a); }
inline void store(double* p, Doubles a) { vst1q_f64(p, a); }

#include "prune.inl"

}  // namespace

const PruneKernels prune_kernels_neon = {abs_sum_any, prune_pixels_nhwc, load_pixels_nhwc,
                                         prune_planes_nchw};

}  // namespace sparsebwd
