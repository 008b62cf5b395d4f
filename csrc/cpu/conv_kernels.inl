// SPDX-License-Identifier: Apache-2.0
// Inner kernels of the sparse convolutions, written over Vec, Quad, Offsets, append_nonzero
// and transpose, which the including file's vec_*.h defines for its instruction set. Everything has
// internal linkage and nothing of the standard library is included: no function compiled here can
// end up running on a machine without these instructions.
#pragma once

#include "conv_kernels.h"

namespace sparsebwd {
namespace {

constexpr int kLanes = Vec::kLanes;
// Products that WGC adds one after the other before they join the sum of the panel, which then joins
// that of all panels: rounding errors grow with the length of such chains. Those of AGB are at most
// kMaxKBlock long.
constexpr int64_t kLongestChain = 32;
// A part of a pixel's channels is a strided read, which hardware prefetches badly.
constexpr int64_t kPrefetchPixels = 16;

// ---- lists

// Whether so many of the vectors of a list's source are more than half full that asking each costs
// more than it saves, see append_nonzero().
inline bool mostly_full(int64_t found, int64_t of) { return found * 5 > of * 2; }

template <bool Full>
inline __attribute__((always_inline)) int64_t list_pixel(const float* g, int64_t ahead,
                                                         int64_t channels, uint32_t step,
                                                         float* values, uint16_t* offsets) {
  const Offsets lane_steps = Offsets::multiples(step);
  int64_t found = 0;
  for (int64_t k = 0; k < channels; k += kLanes) {
    __builtin_prefetch(g + k + ahead);
    const Vec v = k + kLanes <= channels ? Vec::load(g + k) : Vec::load_first(g + k, channels - k);
    found += append_nonzero<Full>(v, lane_steps + static_cast<uint32_t>(k) * step, values + found,
                                  offsets + found);
  }
  return found;
}

// The same for pixels with few non-zeros: by the bits of a mask, the first Usual of which are not asked
// for, as where a mask ends cannot be predicted.
template <int Usual>
inline __attribute__((always_inline)) int64_t list_sparse_pixel(const float* g, int64_t ahead,
                                                                int64_t channels, uint32_t step,
                                                                float* values, uint16_t* offsets) {
  static_assert(Usual <= kLanes, "lists have room for kLanes entries more");
  constexpr int64_t kWord = 64;
  int64_t found = 0;
  for (int64_t k = 0; k < channels; k += kWord, g += kWord) {
    const int64_t width = channels - k < kWord ? channels - k : kWord;
    for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(g + j + ahead);
    uint64_t mask = 0;
    if (width == kWord)
      for (int64_t j = 0; j < kWord; j += kLanes) mask |= Vec::load(g + j).nonzero() << j;
    else
      for (int64_t j = 0; j < width; j += kLanes)
        mask |= Vec::load_first(g + j, width - j).nonzero() << j;
    const uint64_t last = uint64_t{1} << (width - 1);  // an empty mask has no first bit
    const int count = __builtin_popcountll(mask);
    const auto append = [&](int i) __attribute__((always_inline)) {
      const int bit = __builtin_ctzll(mask | last);
      mask &= mask - 1;
      values[found + i] = g[bit];
      offsets[found + i] = static_cast<uint16_t>((static_cast<uint32_t>(k) + bit) * step);
    };
    for (int i = 0; i < Usual; ++i) append(i);
    for (int i = Usual; i < count; ++i) append(i);
    found += count;
  }
  return found;
}

using ListPixel = int64_t (*)(const float* g, int64_t ahead, int64_t channels, uint32_t step,
                              float* values, uint16_t* offsets);

template <ListPixel ListOne>
int64_t list_pixels(const float* g, int64_t pixel_stride, int64_t pixels, int64_t channels,
                    uint32_t step, List list, uint16_t* counts) {
  int64_t total = 0;
  for (int64_t q = 0; q < pixels; ++q, g += pixel_stride) {
    const int64_t found = ListOne(g, kPrefetchPixels * pixel_stride, channels, step,
                                  list.values + total, list.offsets + total);
    counts[q] = static_cast<uint16_t>(found);
    total += found;
  }
  return total;
}

int64_t list_by_pixel(const float* g, int64_t pixel_stride, int64_t pixels, int64_t channels,
                      uint32_t step, List list, uint16_t* counts, Fullness& recent) {
  // Neighbours are alike. Limits: what was fastest with AVX2, from memory too, which hides much.
  const auto list_all = recent.below(2)    ? list_pixels<list_sparse_pixel<2>>
                        : recent.below(4)  ? list_pixels<list_sparse_pixel<4>>
                        : recent.below(26) ? list_pixels<list_pixel<false>>
                                           : list_pixels<list_pixel<true>>;
  const int64_t total = list_all(g, pixel_stride, pixels, channels, step, list, counts);
  recent.add(total, pixels * channels);
  return total;
}

template <bool Full>
inline __attribute__((always_inline)) int64_t list_tile(const float* row, int64_t pixel_stride,
                                                        int64_t height, int64_t channels,
                                                        Offsets offsets, List lists,
                                                        int64_t capacity, uint16_t* counts) {
  int64_t found = 0;
  float* values = lists.values;
  uint16_t* list_offsets = lists.offsets;
  for (int64_t k = 0; k < channels; k += kLanes) {
    const int64_t width = channels - k < kLanes ? channels - k : kLanes;
    Vec tile[kLanes];
    if (height == kLanes && width == kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        __builtin_prefetch(row + k + (kPrefetchPixels + j) * pixel_stride);
        tile[j] = Vec::load(row + k + j * pixel_stride);
      }
    } else {
      for (int j = 0; j < kLanes; ++j)
        tile[j] = j < height ? Vec::load_first(row + k + j * pixel_stride, width) : Vec::zero();
    }
    transpose(tile);
    for (int64_t j = 0; j < width; ++j) {
      const int64_t end = counts[k + j];
      const int n = append_nonzero<Full>(tile[j], offsets, values + end, list_offsets + end);
      counts[k + j] = static_cast<uint16_t>(end + n);
      found += n;
      values += capacity;
      list_offsets += capacity;
    }
  }
  return found;
}

int64_t list_by_channel(const float* g, int64_t pixel_stride, int64_t pixels, int64_t channels,
                        const uint16_t* operand_offsets, List lists, int64_t capacity,
                        uint16_t* counts) {
  int64_t total = 0, found = 0;
  for (int64_t i = 0; i < pixels; i += kLanes, total += found) {
    const auto list_some =
        mostly_full(found, channels * kLanes) ? list_tile<true> : list_tile<false>;
    found = list_some(g + i * pixel_stride, pixel_stride, pixels - i < kLanes ? pixels - i : kLanes,
                      channels, Offsets::load(operand_offsets + i), lists, capacity, counts);
  }
  return total;
}

// ---- the inner loop of both convolutions

// Offset n of four in memory order, read as one word.
template <int N>
inline int64_t nth_offset(uint64_t four) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return static_cast<uint16_t>(four >> (16 * (3 - N)));
#else
  return static_cast<uint16_t>(four >> (16 * N));
#endif
}

// Calls body(value in all lanes, byte offset, n) for every entry, four at a time; n tells the four
// apart and is a constant, 0 for the entries left over.
template <class Body>
inline __attribute__((always_inline)) void for_each_entry(const float* values,
                                                          const uint16_t* offsets, int64_t count,
                                                          Body body) {
  static_assert(sizeof(uint64_t) == 4 * sizeof(uint16_t), "four offsets are one word");
  const float* const last = values + count;
  for (; values + 4 <= last; values += 4, offsets += 4) {
    const Quad g = Quad::load(values);
    uint64_t four;
    __builtin_memcpy(&four, offsets, sizeof(four));
    body(g.broadcast<0>(), nth_offset<0>(four), 0);
    body(g.broadcast<1>(), nth_offset<1>(four), 1);
    body(g.broadcast<2>(), nth_offset<2>(four), 2);
    body(g.broadcast<3>(), nth_offset<3>(four), 3);
  }
  for (; values != last; ++values, ++offsets) body(Vec::broadcast(values), *offsets, 0);
}

// ---- AGB

// What a pixel contributes is accumulated in registers while its list streams by. The sums start at
// zero, not at what is there, and with few of them entries take turns with several sets: short
// chains of additions keep the rounding errors small and hide the latency of the multiply-adds.
template <int Columns, int Vectors>
void agb_run(List list, const Visit* visits, int64_t count, const float* panel, float* dst) {
  constexpr int kSums = Columns * Vectors;
  constexpr int kSets = kSums == 1 ? 4 : kSums <= 4 ? 2 : 1;
  const char* const base = reinterpret_cast<const char*>(panel);
  for (const Visit* const last = visits + count; visits != last; ++visits) {
    float* const sums = reinterpret_cast<float*>(reinterpret_cast<char*>(dst) + visits->dst);
    Vec acc[kSets][kSums];
    for (int set = 0; set < kSets; ++set)
      for (int i = 0; i < kSums; ++i) acc[set][i] = Vec::zero();
    for_each_entry(list.values + visits->start, list.offsets + visits->start, visits->count,
                   [&](Vec g, int64_t at, int n) __attribute__((always_inline)) {
                     const float* operand = reinterpret_cast<const float*>(base + at);
                     Vec(&mine)[kSums] = acc[n % kSets];
                     for (int i = 0; i < kSums; ++i)
                       mine[i] = mine[i].fma(g, Vec::load(operand + i * kLanes));
                   });
    for (int set = 1; set < kSets; ++set)
      for (int i = 0; i < kSums; ++i) acc[0][i] = acc[0][i] + acc[set][i];
    for (int i = 0; i < kSums; ++i)
      (Vec::load(sums + i * kLanes) + acc[0][i]).store(sums + i * kLanes);
  }
}

// ---- WGC

// Fetches `upcoming` in `steps` equal portions, one with every call.
class Fetcher {
 public:
  Fetcher(Upcoming upcoming, int64_t steps) : upcoming_(upcoming), steps_(steps) {}

  inline __attribute__((always_inline)) void step() {
    for (due_ += upcoming_.count; due_ >= steps_;
         due_ -= steps_, upcoming_.from += upcoming_.stride)
      for (int64_t byte = 0; byte < upcoming_.bytes; byte += 64)
        __builtin_prefetch(upcoming_.from + byte);
  }

 private:
  Upcoming upcoming_;
  int64_t steps_, due_ = 0;  // places are due when `count` has been added `steps` times for each
};

// Lists are visited by length, an order that hardware cannot foresee.
inline __attribute__((always_inline)) void prefetch_list(List lists, int64_t start, int64_t count) {
  const char* values = reinterpret_cast<const char*>(lists.values + start);
  const char* offsets = reinterpret_cast<const char*>(lists.offsets + start);
  const int64_t bytes = count * static_cast<int64_t>(sizeof(uint16_t));
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(offsets + byte);
    __builtin_prefetch(values + 2 * byte);
    __builtin_prefetch(values + 2 * byte + 64);
  }
}

// All operands of an entry are at fixed distances: Rows rows of a window, RowSums vectors in each. So
// the sums of an output channel stay in registers while its list streams by. With few sums, entries
// take turns with two or more sets of them.
template <int Rows, int RowSums, int Sets>
void wgc_run(List lists, int64_t capacity, const uint16_t* counts, const uint16_t* order,
             int64_t begin, int64_t last, const float* panel, int64_t row_bytes, float* dw,
             int64_t dw_stride, Upcoming upcoming) {
  constexpr int kSums = Rows * RowSums;
  static_assert((Sets & (Sets - 1)) == 0, "sets are added in pairs");
  const char* rows[Rows];
  for (int row = 0; row < Rows; ++row)
    rows[row] = reinterpret_cast<const char*>(panel) + row * row_bytes;
  Fetcher fetcher(upcoming, last - begin);
  for (int64_t i = begin; i < last; ++i) {
    fetcher.step();
    const int64_t k = order[i];
    float* sums = dw + k * dw_stride;
    const float* values = lists.values + k * capacity;
    const uint16_t* offsets = lists.offsets + k * capacity;
    if (i + 1 < last) prefetch_list(lists, order[i + 1] * capacity, counts[order[i + 1]]);
    Vec total[kSums];
    for (int t = 0; t < kSums; ++t) total[t] = Vec::zero();
    for (int64_t left = counts[k]; left > 0; left -= kLongestChain) {
      Vec acc[Sets][kSums];
      for (int set = 0; set < Sets; ++set)
        for (int t = 0; t < kSums; ++t) acc[set][t] = Vec::zero();
      for_each_entry(values, offsets, left < kLongestChain ? left : kLongestChain,
                     [&](Vec g, int64_t at, int n) __attribute__((always_inline)) {
                       Vec(&mine)[kSums] = acc[n % Sets];
                       for (int row = 0; row < Rows; ++row) {
                         const float* x = reinterpret_cast<const float*>(rows[row] + at);
                         for (int t = 0; t < RowSums; ++t)
                           mine[row * RowSums + t] =
                               mine[row * RowSums + t].fma(g, Vec::load(x + t * kLanes));
                       }
                     });
      // In pairs, so that each part of the list is one addition of the chain that `total` is.
      for (int half = Sets / 2; half > 0; half /= 2)
        for (int set = 0; set < half; ++set)
          for (int t = 0; t < kSums; ++t) acc[set][t] = acc[set][t] + acc[set + half][t];
      for (int t = 0; t < kSums; ++t) total[t] = total[t] + acc[0][t];
      values += kLongestChain;
      offsets += kLongestChain;
    }
    for (int t = 0; t < kSums; ++t)
      (Vec::load(sums + t * kLanes) + total[t]).store(sums + t * kLanes);
  }
}

// ---- layouts

// `count` floats, `step` apart; zeros behind.
template <int Step>
inline __attribute__((always_inline)) Vec load_apart(const float* p, int64_t step, int64_t count) {
  if (Step == 1) return count == kLanes ? Vec::load(p) : Vec::load_first(p, count);
  if (Step == 2) return count == kLanes ? Vec::load_even(p) : Vec::load_even_first(p, count);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i * step];
  return Vec::load(lanes);
}

// The columns of `rows` <= kLanes rows, `columns` <= kLanes.
template <int Step>
inline __attribute__((always_inline)) void load_tile(const float* src, int64_t src_stride,
                                                     int64_t step, int64_t rows, int64_t columns,
                                                     Vec (&tile)[kLanes]) {
  if (rows == kLanes && columns == kLanes) {
    for (int64_t t = 0; t < kLanes; ++t) {
      // Of the tile after the next: rows are too many streams for the hardware.
      __builtin_prefetch(src + t * src_stride + 2 * kLanes * step);
      tile[t] = load_apart<Step>(src + t * src_stride, step, kLanes);
    }
  } else {
    for (int64_t t = 0; t < kLanes; ++t)
      tile[t] = t < rows ? load_apart<Step>(src + t * src_stride, step, columns) : Vec::zero();
  }
  transpose(tile);
}

template <int Step>
void transpose_apart(const float* src, int64_t src_stride, int64_t step, int64_t rows,
                     int64_t columns, float* dst, int64_t dst_stride) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t width = columns - j < kLanes ? columns - j : kLanes;
    for (int64_t i = 0; i < rows; i += kLanes) {
      const int64_t height = rows - i < kLanes ? rows - i : kLanes;
      float* to = dst + j * dst_stride + i;
      Vec tile[kLanes];
      load_tile<Step>(src + i * src_stride + j * step, src_stride, step, height, width, tile);
      if (height < kLanes)
        for (int64_t t = 0; t < width; ++t) tile[t].store_first(to + t * dst_stride, height);
      else if (width < kLanes)
        for (int64_t t = 0; t < width; ++t) tile[t].store(to + t * dst_stride);
      else
        for (int64_t t = 0; t < kLanes; ++t) tile[t].store(to + t * dst_stride);
    }
  }
}

void transpose(const float* src, int64_t src_stride, int64_t step, int64_t rows, int64_t columns,
               float* dst, int64_t dst_stride) {
  const auto kernel = step == 1   ? transpose_apart<1>
                      : step == 2 ? transpose_apart<2>
                                  : transpose_apart<0>;
  kernel(src, src_stride, step, rows, columns, dst, dst_stride);
}

// ---- panels

template <int Vectors>
void copy_pixels(const float* src, int64_t src_stride, int64_t pixels, float* dst) {
  for (int64_t i = 0; i < pixels; ++i, src += src_stride, dst += Vectors * kLanes)
    for (int j = 0; j < Vectors; ++j) Vec::load(src + j * kLanes).store(dst + j * kLanes);
}

void gather_pixels(const void* src, DType dtype, int64_t src_stride, int64_t pixels,
                   int64_t channels, float* dst, int64_t group) {
  if (dtype == DType::kFloat32 && channels == group) {
    const float* p = static_cast<const float*>(src);
    if (group == kLanes) return copy_pixels<1>(p, src_stride, pixels, dst);
    if (group == 2 * kLanes) return copy_pixels<2>(p, src_stride, pixels, dst);
    if (group == 4 * kLanes) return copy_pixels<4>(p, src_stride, pixels, dst);
    if (group == 8 * kLanes) return copy_pixels<8>(p, src_stride, pixels, dst);
  }
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t i = 0; i < pixels; ++i, dst += group) {
    int64_t c = 0;
    if (dtype == DType::kFloat32) {
      const float* p = static_cast<const float*>(src) + i * src_stride;
      for (; c < whole; c += kLanes) Vec::load(p + c).store(dst + c);
      if (c < channels) Vec::load_first(p + c, channels - c).store(dst + c);
      if (c < channels) c += kLanes;
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(src) + i * src_stride;
      for (; c < channels; ++c) dst[c] = float_of_bfloat16(p[c]);
    }
    for (; c < group; ++c) dst[c] = 0.0f;
  }
}

void scatter_pixels(const float* src, int64_t group, int64_t pixels, int64_t channels, void* dst,
                    DType dtype, int64_t dst_stride) {
  for (int64_t i = 0; i < pixels; ++i, src += group) {
    if (dtype == DType::kFloat32) {
      float* p = static_cast<float*>(dst) + i * dst_stride;
      const bool aligned = reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(float)) == 0;
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        if (aligned) Vec::load(src + c).stream(p + c);
        else Vec::load(src + c).store(p + c);
      }
      if (c < channels) Vec::load(src + c).store_first(p + c, channels - c);
    } else {
      uint16_t* p = static_cast<uint16_t*>(dst) + i * dst_stride;
      for (int64_t c = 0; c < channels; ++c) p[c] = bfloat16_of_float(src[c]);
    }
  }
}

// ---- the table

constexpr AgbKernel kAgbKernels[] = {
    {3, 4 * kLanes, agb_run<3, 4>}, {3, 2 * kLanes, agb_run<3, 2>}, {1, 8 * kLanes, agb_run<1, 8>},
    {1, 4 * kLanes, agb_run<1, 4>}, {1, 2 * kLanes, agb_run<1, 2>}, {1, kLanes, agb_run<1, 1>},
};

constexpr WgcKernel kWgcKernels[] = {
    {3, 1, kLanes, true, wgc_run<3, 1, 4>},      {3, 3, kLanes, false, wgc_run<3, 3, 1>},
    {1, 1, 8 * kLanes, false, wgc_run<1, 8, 1>}, {1, 1, 4 * kLanes, false, wgc_run<1, 4, 2>},
    {1, 1, 2 * kLanes, false, wgc_run<1, 2, 2>}, {1, 1, kLanes, false, wgc_run<1, 1, 4>},
};

constexpr ConvKernels kConvKernels = {
    kLanes,
    list_by_pixel,
    list_by_channel,
    kAgbKernels,
    sizeof(kAgbKernels) / sizeof(kAgbKernels[0]),
    kWgcKernels,
    sizeof(kWgcKernels) / sizeof(kWgcKernels[0]),
    transpose,
    gather_pixels,
    scatter_pixels,
    Vec::finish_stores,
};

}  // namespace
}  // namespace sparsebwd
