// SPDX-License-Identifier: Apache-2.0
// The inner kernels of the sparse convolutions, as each instruction set provides them. The drivers
// (lists.cpp, agb.cpp, wgc.cpp) are written against this table only.
#pragma once

#include <stdint.h>

#include "sparsebwd/dtype.h"

namespace sparsebwd {

// A list of non-zeros: entry i is a value of the gradient and the byte offset of the operand it
// multiplies. Offsets are relative to a panel of operands that fits the L1 cache: 16 bits suffice.
struct List {
  float* values;
  uint16_t* offsets;
};

// How full the gradient was lately: of the last few rows that were listed, fading.
struct Fullness {
  int64_t entries = 0, elements = 0;

  void add(int64_t found, int64_t of) {
    entries += found - entries / 8;
    elements += of - elements / 8;
  }
  bool below(int64_t of_64) const { return entries * 64 < elements * of_64; }
};

// Bytes that 16-bit offsets can address.
constexpr int64_t kMaxPanelBytes = 65536;

// The entries of one pixel for AGB: `count` of them from `start` on, added at `dst` bytes.
struct Visit {
  uint32_t start, count, dst;
};

// For every visit, every entry of it, column j < columns and channel c < group:
// dst[visit.dst / 4 + j * group + c] += value * panel[offset / 4 + j * group + c]. Visits
// are in an order that makes the inner loop fast (PixelLists); the places of two of them may overlap.
using AgbRun = void (*)(List list, const Visit* visits, int64_t count, const float* panel,
                        float* dst);

struct AgbKernel {
  int columns;  // of the input that one entry contributes to
  int group;    // input channels
  AgbRun run;
};

// Memory that is needed next: `bytes` bytes at each of `count` places, `stride` bytes apart. Kernels
// fetch a little of it with every list, as a burst of prefetches would stall them.
struct Upcoming {
  const char* from;
  int64_t stride, count, bytes;
};

// For every k in order[begin .. end): dw[k * dw_stride + ...] += sum over the list of k of value *
// operands at the entry's offset in the panel. List k starts at lists + k * capacity. `order` is
// sorted by count, so that the inner loop's exit is predictable.
using WgcRun = void (*)(List lists, int64_t capacity, const uint16_t* counts, const uint16_t* order,
                        int64_t begin, int64_t end, const float* panel, int64_t row_bytes,
                        float* dw, int64_t dw_stride, Upcoming upcoming);

struct WgcKernel {
  // Rows and columns of the filter that an entry contributes to, with sums of `group` floats for
  // each: a window whose rows are row_bytes apart in the panel, or (1 x 1) a single tap.
  int rows, columns;
  int group;
  // `group` floats hold all columns of a row of the filter, channel after channel, and the pixels of
  // the panel overlap so: for few input channels. Otherwise they are the input channels of one tap.
  bool packed;
  WgcRun run;
};

struct ConvKernels {
  int lanes;

  // Lists in the order of AGB, one after the other for `pixels` pixels of `channels` channels; the
  // operand of channel k is k * step bytes into the panel. Needs room for `lanes` entries more.
  // Returns the number of entries. `recent` goes from call to call: how full the gradient was lately.
  int64_t (*list_by_pixel)(const float* g, int64_t pixel_stride, int64_t pixels, int64_t channels,
                           uint32_t step, List list, uint16_t* counts, Fullness& recent);

  // Lists in the order of WGC: appends pixels to the lists of all channels. List k starts at
  // lists + k * capacity, counts[k] is its length. operand_offsets[i] is the offset of pixel i's
  // operand, readable for `lanes` more. Lists need room for `lanes` entries more. Returns
  // the number of entries appended.
  int64_t (*list_by_channel)(const float* g, int64_t pixel_stride, int64_t pixels, int64_t channels,
                             const uint16_t* operand_offsets, List lists, int64_t capacity,
                             uint16_t* counts);

  // Alternatives, best first; the last of each fits every problem.
  const AgbKernel* agb;
  int agb_count;
  const WgcKernel* wgc;
  int wgc_count;

  // dst[j * dst_stride + i] = src[i * src_stride + j * step] for i < rows, j < columns.
  void (*transpose)(const float* src, int64_t src_stride, int64_t step, int64_t rows,
                    int64_t columns, float* dst, int64_t dst_stride);

  // Copies `channels` of each pixel to a panel of float32, `group` floats a pixel, zeros behind.
  void (*gather_pixels)(const void* src, DType dtype, int64_t src_stride, int64_t pixels,
                        int64_t channels, float* dst, int64_t group);

  // Writes `channels` of each pixel of a float32 panel to a tensor; bypasses the caches where it
  // can, as the tensor is larger than they are. finish_stores() before another thread reads it.
  void (*scatter_pixels)(const float* src, int64_t group, int64_t pixels, int64_t channels,
                         void* dst, DType dtype, int64_t dst_stride);
  void (*finish_stores)();
};

extern const ConvKernels conv_kernels_baseline;
extern const ConvKernels conv_kernels_avx2;
extern const ConvKernels conv_kernels_avx512;
extern const ConvKernels conv_kernels_neon;

}  // namespace sparsebwd
