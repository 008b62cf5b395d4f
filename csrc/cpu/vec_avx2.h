// SPDX-License-Identifier: Apache-2.0
// Eight float lanes, AVX2 and FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace sparsebwd {
namespace {

// For every mask of eight lanes, the numbers of its set lanes, in order.
struct CompressTable {
  alignas(8) uint8_t lanes[256][8];

  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][n++] = static_cast<uint8_t>(lane);
    }
  }
};

constexpr CompressTable kCompressTable;

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_first(const float* p, int64_t count) {
    return {_mm256_maskload_ps(p, mask_of(count))};
  }
  // p[0], p[2] and so on; reads nothing behind the last one.
  static Vec load_even(const float* p) { return even(load(p), load(p + 7)); }
  static Vec load_even_first(const float* p, int64_t count) {
    return even(load_first(p, 2 * count - 1), load_first(p + 7, 2 * count - 8));
  }
  static Vec broadcast(const float* p) { return {_mm256_broadcast_ss(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int64_t count) const { _mm256_maskstore_ps(p, mask_of(count), v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  // bfloat16, rounded as bfloat16_of_float does.
  static Vec load(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  void store(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(p),
        _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  static void finish_stores() { _mm_sfence(); }
  Vec fma(Vec a, Vec b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
  Vec operator+(Vec o) const { return {_mm256_add_ps(v, o.v)}; }
  // Of lane i, bit i.
  uint64_t nonzero() const {
    return static_cast<uint32_t>(
        _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  }

 private:
  // Lanes 0, 2, 4, 6 of `low` and 1, 3, 5, 7 of `high`.
  static Vec even(Vec low, Vec high) {
    const __m256 mixed = _mm256_shuffle_ps(low.v, high.v, 0xd8);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8))};
  }
  static __m256i mask_of(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count < 8 ? count : 8)), lanes);
  }
};

// Four values, loaded at once: a broadcast from memory for each would take a load slot that the
// multiply-adds need.
struct Quad {
  __m256 v;

  static Quad load(const float* p) { return {_mm256_castps128_ps256(_mm_loadu_ps(p))}; }
  template <int Lane>
  Vec broadcast() const {
    return {_mm256_permutevar8x32_ps(v, _mm256_set1_epi32(Lane))};
  }
};

// Byte offsets of kLanes operands.
struct Offsets {
  __m256i v;

  static Offsets multiples(uint32_t step) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_mullo_epi32(lanes, _mm256_set1_epi32(static_cast<int>(step)))};
  }
  static Offsets load(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  Offsets operator+(uint32_t base) const {
    return {_mm256_add_epi32(v, _mm256_set1_epi32(static_cast<int>(base)))};
  }
};

// Appends the non-zero lanes of `v` and the offsets of those lanes to a list; returns their
// number. Both arrays must have room for kLanes more entries. Full: expect most to be non-zero.
template <bool Full>
inline int append_nonzero(Vec v, Offsets o, float* values, uint16_t* offsets) {
  const int keep = _mm256_movemask_ps(_mm256_cmp_ps(v.v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  int64_t lanes;
  memcpy(&lanes, kCompressTable.lanes[keep], 8);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(lanes));
  _mm256_storeu_ps(values, _mm256_permutevar8x32_ps(v.v, order));
  const __m256i kept = _mm256_permutevar8x32_epi32(o.v, order);
  const __m128i narrow =
      _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), narrow);
  return __builtin_popcount(keep);
}

// Transposes a kLanes x kLanes tile in place.
inline void transpose(Vec (&tile)[Vec::kLanes]) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(tile[i].v, tile[i + 1].v);
    pair[i + 1] = _mm256_unpackhi_ps(tile[i].v, tile[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      quad[i + 2 * half] = _mm256_shuffle_ps(pair[i + half], pair[i + 2 + half], 0x44);
      quad[i + 2 * half + 1] = _mm256_shuffle_ps(pair[i + half], pair[i + 2 + half], 0xee);
    }
  for (int c = 0; c < 4; ++c) {
    tile[c].v = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x20);
    tile[4 + c].v = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x31);
  }
}

}  // namespace
}  // namespace sparsebwd
