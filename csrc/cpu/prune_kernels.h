// SPDX-License-Identifier: Apache-2.0
// Sum of magnitudes and stochastic pruning: the kernels that exist once for each instruction set.
// All of them give the same bits.
#pragma once

#include <stdint.h>

#include "sparsebwd/dtype.h"
#include "sparsebwd/prune.h"

namespace sparsebwd {

// `spec` for image n, where images have thresholds of their own; null: they have not.
static inline PruneSpec of_image(PruneSpec spec, const float* taus, int64_t n) {
  if (taus) spec.tau = taus[n];
  return spec;
}

struct PruneKernels {
  // Sum of |g| over `count` elements, in float64 and in a fixed order: element i goes to partial
  // sum i % 32; the partial sums are added pairwise, i with i + 16, then 8, 4, 2, 1. *nonzeros
  // receives the number of elements that are not zero (a NaN is not).
  double (*abs_sum)(const void* g, DType dtype, int64_t count, int64_t* nonzeros);

  // Prunes `pixels` neighbours of a row, from column w on, of `channels` channels each, stored
  // channel by channel with `pixel_stride` elements between pixels. `out` (may be null, may be g)
  // has the strides and the dtype of g; `out_f32` (may be null) receives the same values as
  // float32, `f32_stride` elements between pixels; not both are null. Returns the number of
  // non-zeros.
  int64_t (*prune_pixels_nhwc)(const void* g, DType dtype, int64_t pixel_stride, void* out,
                               float* out_f32, int64_t f32_stride, uint32_t n, uint32_t h,
                               uint32_t w, int64_t pixels, int64_t channels, const PruneSpec& spec);

  // The same with nothing pruned: copies, converts and counts.
  int64_t (*load_pixels_nhwc)(const void* g, DType dtype, int64_t pixel_stride, void* out,
                              float* out_f32, int64_t f32_stride, int64_t pixels, int64_t channels);

  // Prunes pixels `first` .. `first + pixels - 1` (numbered row by row, `width` to a row) of the
  // planes of channels c_begin .. c_end - 1, `plane_stride` elements apart; c_begin is a multiple
  // of 4. g and out (may be g) point to pixel 0 of channel c_begin. spec.tau > 0. Returns the
  // number of non-zeros.
  int64_t (*prune_planes_nchw)(const void* g, DType dtype, int64_t plane_stride, void* out,
                               uint32_t n, int64_t c_begin, int64_t c_end, int64_t first,
                               int64_t pixels, int64_t width, const PruneSpec& spec);
};

extern const PruneKernels prune_kernels_baseline;
extern const PruneKernels prune_kernels_avx2;
extern const PruneKernels prune_kernels_avx512;
extern const PruneKernels prune_kernels_neon;

}  // namespace sparsebwd
