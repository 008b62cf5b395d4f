// SPDX-License-Identifier: Apache-2.0
// Sixteen float lanes, AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace sparsebwd {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_first(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(mask_of(count), p)};
  }
  // p[0], p[2] and so on; reads nothing behind the last one.
  static Vec load_even(const float* p) { return even(load(p), load(p + 15)); }
  static Vec load_even_first(const float* p, int64_t count) {
    return even(load_first(p, 2 * count - 1), load_first(p + 15, 2 * count - 16));
  }
  static Vec broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, mask_of(count), v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  // bfloat16, rounded as bfloat16_of_float does.
  static Vec load(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  void store(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
  }
  static void finish_stores() { _mm_sfence(); }
  Vec fma(Vec a, Vec b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }
  Vec operator+(Vec o) const { return {_mm512_add_ps(v, o.v)}; }
  // Of lane i, bit i.
  uint64_t nonzero() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }

 private:
  // Lanes 0, 2, ... of `low` and 1, 3, ... of `high`.
  static Vec even(Vec low, Vec high) {
    const __m512i lanes =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_permutex2var_ps(low.v, lanes, high.v)};
  }
  static __mmask16 mask_of(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffffu : count > 0 ? (1u << count) - 1u : 0u);
  }
};

// Four values, loaded at once: a broadcast from memory for each would take a load slot that the
// multiply-adds need.
struct Quad {
  __m512 v;

  static Quad load(const float* p) { return {_mm512_castps128_ps512(_mm_loadu_ps(p))}; }
  template <int Lane>
  Vec broadcast() const {
    return {_mm512_permutexvar_ps(_mm512_set1_epi32(Lane), v)};
  }
};

// Byte offsets of kLanes operands.
struct Offsets {
  __m512i v;

  static Offsets multiples(uint32_t step) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(step)))};
  }
  static Offsets load(const uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  Offsets operator+(uint32_t base) const {
    return {_mm512_add_epi32(v, _mm512_set1_epi32(static_cast<int>(base)))};
  }
};

// Appends the non-zero lanes of `v` and the offsets of those lanes to a list; returns their
// number. Both arrays must have room for kLanes more entries. Full: expect most to be non-zero.
template <bool Full>
inline int append_nonzero(Vec v, Offsets o, float* values, uint16_t* offsets) {
  const __mmask16 keep = _mm512_cmp_ps_mask(v.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const int count = __builtin_popcount(keep);
  const __m512 kept = _mm512_maskz_compress_ps(keep, v.v);
  const __m256i kept_offsets = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(keep, o.v));
  // Stores that straddle cache lines are what takes the time: short ones do so less often.
  if (Full || count > 8) {
    _mm512_storeu_ps(values, kept);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets), kept_offsets);
  } else {
    _mm256_storeu_ps(values, _mm512_castps512_ps256(kept));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), _mm256_castsi256_si128(kept_offsets));
  }
  return count;
}

// Transposes a kLanes x kLanes tile in place.
inline void transpose(Vec (&tile)[Vec::kLanes]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(tile[i].v, tile[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(tile[i].v, tile[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(t[i + half]);
      const __m512d b = _mm512_castps_pd(t[i + 2 + half]);
      u[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // u[4 * r + c] holds, in its four 128-bit parts, columns c, c + 4, c + 8, c + 12 of rows
  // 4r .. 4r + 3; what is left is a 4 x 4 transpose of those parts.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    const __m512 e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    tile[c].v = _mm512_shuffle_f32x4(a, b, 0x88);
    tile[c + 8].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    tile[c + 4].v = _mm512_shuffle_f32x4(d, e, 0x88);
    tile[c + 12].v = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
}

}  // namespace
}  // namespace sparsebwd
