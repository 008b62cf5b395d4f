// SPDX-License-Identifier: Apache-2.0
// The inner kernels of the depthwise convolutions, as each instruction set provides them. The driver
// (depthwise.cpp) is written against this table only.
//
// Kernels compute on tiles of float32 that fit the caches: `lanes` channels side by side for each
// pixel. Layout and type of tensors matter only where a tile is gathered or scattered.
#pragma once

#include <stdint.h>

#include "sparsebwd/dtype.h"

namespace sparsebwd {

// Most taps, that is elements of a filter, that a kernel takes at once: their sums are in registers.
constexpr int kMostTaps = 9;

// A rectangle of pixels of the input. The gradient of the output that meets pixel i through tap t is
// at g + offsets[t] + i * lanes, with rows that are g_pitch apart. x and dx are in tiles, or in tensors:
// their pixels are a step apart, their rows a pitch.
struct DepthwiseRun {
  const float* g;
  const int32_t* offsets;  // in floats, one for each tap
  int64_t g_pitch;
  const float* x;
  int64_t x_step, x_pitch;
  float* dx;
  int64_t dx_step, dx_pitch;
  int64_t rows, columns;
  bool accumulate;  // dx is added to, not only written
  const float* weight;  // [tap][lanes]
  float* grad_weight;  // [tap][lanes], added to
};

// For every pixel and tap: dx += weight * g (AGB), and grad_weight += x * g (WGC).
using DepthwiseKernel = void (*)(const DepthwiseRun& run);

// A part of an activation: `pixels` pixels of `channels` channels.
struct DepthwisePixels {
  void* data;
  DType dtype;
  int64_t pixel_stride, channel_stride;  // elements
  int64_t pixels, channels;
};

// A tile: pixel i is offsets[i] floats behind `data`, and its next `lanes` channels are vector_stride
// floats further.
struct DepthwiseTile {
  float* data;
  const int32_t* offsets;
  int64_t vector_stride;
};

struct DepthwiseKernels {
  int lanes;
  // Of 1 to kMostTaps taps, by number - 1.
  DepthwiseKernel both[kMostTaps], agb[kMostTaps], wgc[kMostTaps];

  // Lanes behind the last channel are zero.
  void (*gather)(const DepthwisePixels& from, const DepthwiseTile& to);
  // Stream: bypass the caches where that is possible. finish_stores() before another thread reads.
  void (*scatter)(const DepthwiseTile& from, const DepthwisePixels& to, bool stream);
  void (*finish_stores)();
};

extern const DepthwiseKernels depthwise_kernels_baseline;
extern const DepthwiseKernels depthwise_kernels_avx2;
extern const DepthwiseKernels depthwise_kernels_avx512;
extern const DepthwiseKernels depthwise_kernels_neon;

}  // namespace sparsebwd
