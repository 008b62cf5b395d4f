// SPDX-License-Identifier: Apache-2.0
// Pruning kernels, AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#include "prune_kernels.h"

namespace sparsebwd {
namespace {

using Floats = __m512;
using Words = __m512i;
using Doubles = __m512d;
using Counters = __m512i;
constexpr int kLanes = 16;

// Numbers of the lanes of a Counters vector; and the order of them that unpack_low and unpack_high
// undo.
constexpr uint64_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr uint64_t kUnpackOrder[] = {0, 4, 1, 5, 2, 6, 3, 7};

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }

inline Floats load(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(uint16_t* p, Floats v) {
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}

// 2 * kLanes bfloat16, those of even and those of odd index.
inline void load_even_odd(const uint16_t* p, Floats& even, Floats& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(~0xFFFF)));
}
inline void store_even_odd(uint16_t* p, Floats even, Floats odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_castps_si512(odd)));
}
// Stores even[0], odd[0], even[1], odd[1] and so on.
inline void store_zipped(float* p, Floats even, Floats odd) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store(p, _mm512_permutex2var_ps(even, first, odd));
  store(p + kLanes, _mm512_permutex2var_ps(even, second, odd));
}

inline Counters broadcast_counter(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline Counters load_counters(const uint64_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint64_t* p, Counters a) { _mm512_storeu_si512(p, a); }
inline Counters add(Counters a, Counters b) { return _mm512_add_epi64(a, b); }
inline Counters multiply(Counters a, Counters b) { return _mm512_mul_epu32(a, b); }
inline Counters high(Counters a) { return _mm512_srli_epi64(a, 32); }
inline Counters xor2(Counters a, Counters b) { return _mm512_xor_si512(a, b); }
inline Counters xor3(Counters a, Counters b, Counters c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}
// Where inner >= width: inner - width, and one more outer.
inline void carry(Counters& inner, Counters& outer, Counters width) {
  const __mmask8 over = _mm512_cmpge_epu64_mask(inner, width);
  inner = _mm512_mask_sub_epi64(inner, over, inner, width);
  outer = _mm512_mask_add_epi64(outer, over, outer, _mm512_set1_epi64(1));
}

// Low words of a in the even lanes, of b in the odd ones.
inline Counters interleave(Counters a, Counters b) {
  return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA);
}
inline Words unpack_low(Counters a, Counters b) { return _mm512_unpacklo_epi64(a, b); }
inline Words unpack_high(Counters a, Counters b) { return _mm512_unpackhi_epi64(a, b); }
inline Words words_of(Counters a) { return a; }

inline Words zero_words() { return _mm512_setzero_si512(); }
inline int64_t sum(Words a) {
  const __m512i low = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(a));
  const __m512i high = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(a, 1));
  return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

inline Floats broadcast_float(float x) { return _mm512_set1_ps(x); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats absolute(Floats a) { return _mm512_abs_ps(a); }

// The high 24 bits of each word in place: uniform on [0, 1) in units of kRandomUnit.
constexpr float kRandomUnit = 0x1p-32f;
inline Floats random_bits(Words words) {
  return _mm512_cvtepu32_ps(_mm512_and_si512(words, _mm512_set1_epi32(~0xFF)));
}

// copysign(max(|g|, tau), g) where |g| > t or g is a NaN, else +0.
inline Floats keep_above(Floats g, Floats t, Floats tau, Words& nonzeros) {
  const Floats magnitude = _mm512_abs_ps(g);
  const __mmask16 keep = _mm512_cmp_ps_mask(magnitude, t, _CMP_NLE_UQ);
  nonzeros = _mm512_mask_sub_epi32(nonzeros, keep, nonzeros, _mm512_set1_epi32(-1));
  // The second operand is the result where one is a NaN.
  const Floats raised = _mm512_max_ps(tau, magnitude);
  return _mm512_castsi512_ps(
      _mm512_maskz_ternarylogic_epi32(keep, _mm512_castps_si512(g), _mm512_castps_si512(raised),
                                      _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0xE4));
}

inline void count_nonzeros(Floats a, Words& nonzeros) {
  const __mmask16 mask = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  nonzeros = _mm512_mask_sub_epi32(nonzeros, mask, nonzeros, _mm512_set1_epi32(-1));
}

inline Doubles zero_doubles() { return _mm512_setzero_pd(); }
inline Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
inline Doubles widen_low(Floats a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
inline Doubles widen_high(Floats a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
inline void store(double* p, Doubles a) { _mm512_storeu_pd(p, a); }

#include "prune.inl"

}  // namespace

const PruneKernels prune_kernels_avx512 = {abs_sum_any, prune_pixels_nhwc, load_pixels_nhwc,
                                           prune_planes_nchw};

}  // namespace sparsebwd
