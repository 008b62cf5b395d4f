// SPDX-License-Identifier: Apache-2.0
// Pruning kernels, AVX2.
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#include "prune_kernels.h"

namespace sparsebwd {
namespace {

using Floats = __m256;
using Words = __m256i;
using Doubles = __m256d;
using Counters = __m256i;
constexpr int kLanes = 8;

// Numbers of the lanes of a Counters vector; and the order of them that unpack_low and unpack_high
// undo.
constexpr uint64_t kLaneNumbers[] = {0, 1, 2, 3};
constexpr uint64_t kUnpackOrder[] = {0, 2, 1, 3};

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }

inline Floats load(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store(uint16_t* p, Floats v) {
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}

// 2 * kLanes bfloat16, those of even and those of odd index.
inline void load_even_odd(const uint16_t* p, Floats& even, Floats& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(~0xFFFF)));
}
inline void store_even_odd(uint16_t* p, Floats even, Floats odd) {
  const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_or_si256(low, _mm256_castps_si256(odd)));
}
// Stores even[0], odd[0], even[1], odd[1] and so on.
inline void store_zipped(float* p, Floats even, Floats odd) {
  const Floats low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  store(p, _mm256_permute2f128_ps(low, high, 0x20));
  store(p + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
}

inline Counters broadcast_counter(uint64_t x) {
  return _mm256_set1_epi64x(static_cast<int64_t>(x));
}
inline Counters load_counters(const uint64_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline void store(uint64_t* p, Counters a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a);
}
inline Counters add(Counters a, Counters b) { return _mm256_add_epi64(a, b); }
inline Counters multiply(Counters a, Counters b) { return _mm256_mul_epu32(a, b); }
inline Counters high(Counters a) { return _mm256_srli_epi64(a, 32); }
inline Counters xor2(Counters a, Counters b) { return _mm256_xor_si256(a, b); }
inline Counters xor3(Counters a, Counters b, Counters c) { return xor2(a, xor2(b, c)); }
// Where inner >= width: inner - width, and one more outer.
inline void carry(Counters& inner, Counters& outer, Counters width) {
  const __m256i under = _mm256_cmpgt_epi64(width, inner);
  inner = _mm256_sub_epi64(inner, _mm256_andnot_si256(under, width));
  outer = _mm256_add_epi64(outer, _mm256_add_epi64(under, _mm256_set1_epi64x(1)));
}

// Low words of a in the even lanes, of b in the odd ones.
inline Counters interleave(Counters a, Counters b) {
  return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA);
}
inline Words unpack_low(Counters a, Counters b) { return _mm256_unpacklo_epi64(a, b); }
inline Words unpack_high(Counters a, Counters b) { return _mm256_unpackhi_epi64(a, b); }
inline Words words_of(Counters a) { return a; }

inline Words zero_words() { return _mm256_setzero_si256(); }
inline int64_t sum(Words a) {
  uint32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), a);
  int64_t total = 0;
  for (int i = 0; i < 8; ++i) total += lanes[i];
  return total;
}

inline Floats broadcast_float(float x) { return _mm256_set1_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats absolute(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

// The high 24 bits of each word: uniform on [0, 1) in units of kRandomUnit.
constexpr float kRandomUnit = 0x1p-24f;
inline Floats random_bits(Words words) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8)); }

// copysign(max(|g|, tau), g) where |g| > t or g is a NaN, else +0.
inline Floats keep_above(Floats g, Floats t, Floats tau, Words& nonzeros) {
  const Floats sign = _mm256_set1_ps(-0.0f);
  const Floats magnitude = _mm256_andnot_ps(sign, g);
  const Floats keep = _mm256_cmp_ps(magnitude, t, _CMP_NLE_UQ);
  nonzeros = _mm256_sub_epi32(nonzeros, _mm256_castps_si256(keep));
  // The second operand is the result where one is a NaN.
  const Floats raised = _mm256_max_ps(tau, magnitude);
  return _mm256_and_ps(keep, _mm256_or_ps(_mm256_and_ps(sign, g), raised));
}

inline void count_nonzeros(Floats a, Words& nonzeros) {
  const Floats mask = _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  nonzeros = _mm256_sub_epi32(nonzeros, _mm256_castps_si256(mask));
}

inline Doubles zero_doubles() { return _mm256_setzero_pd(); }
inline Doubles add(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
inline Doubles widen_low(Floats a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
inline Doubles widen_high(Floats a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
inline void store(double* p, Doubles a) { _mm256_storeu_pd(p, a); }

#include "prune.inl"

}  // namespace

const PruneKernels prune_kernels_avx2 = {abs_sum_any, prune_pixels_nhwc, load_pixels_nhwc,
                                         prune_planes_nchw};

}  // namespace sparsebwd
