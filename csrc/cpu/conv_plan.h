// SPDX-License-Identifier: Apache-2.0
// How the work on a problem is cut into panels, bands and chunks: a function of the problem, of the
// instruction set, and of how sparse a sample of the gradient is.
#pragma once

#include <stdint.h>

#include "conv_backward.h"
#include "conv_kernels.h"
#include "sparsebwd/integers.h"

namespace sparsebwd {

// Most output channels of a panel of weights.
constexpr int64_t kMaxKBlock = 256;

// Pixels whose lists are sorted by length together; also the most images of a tile.
constexpr int64_t kSortedPixels = 64;

// Images [begin, end).
struct Images {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// Rows of the gradient, numbered n * P + p.
struct Rows {
  int64_t first, count;
};

struct AgbPlan {
  const AgbKernel* kernel = nullptr;
  int64_t channels;  // input channels of a convolution group
  int64_t channel_blocks;  // of kernel->group
  int64_t column_steps;  // columns of the filter / those of the inner kernel
  int64_t k_block, k_blocks;  // output channels of a panel; panels of a convolution group
  int64_t panel_floats;
  int64_t capacity;  // entries of the list of one row and k-block
  int64_t padded_w;  // columns of a row of partial sums
  int64_t band_rows;  // rows of grad_input whose partial sums are held at a time, per image
  int64_t images;  // of a tile: the same row of so many images

  uint32_t step() const { return static_cast<uint32_t>(kernel->columns * kernel->group * 4); }
  int64_t row_floats() const { return padded_w * kernel->group; }
  int64_t image_floats() const { return band_rows * row_floats(); }
};

// The pixels of the gradient are cut into units of whole rows, and a unit into segments; the pixels
// of one segment of a unit are a panel.
struct WgcPlan {
  const WgcKernel* kernel = nullptr;
  int64_t channels;
  int64_t channel_blocks;
  int64_t pitch;  // floats between pixels of a panel of input
  int64_t filter_floats;  // sums of one output channel and block of input channels
  int64_t images;  // of a block: more than one if a unit is several whole images
  int64_t unit_rows;
  int64_t units_per_block;
  int64_t segment;  // columns of a segment
  int64_t segments;  // of a row
  int64_t capacity;  // entries of the list of a channel and panel

  bool window() const { return kernel->rows > 1; }
};

// Why the kernels do not take a problem that problem_refusal() passed, as a sentence without a full
// stop: something that they count in 16 or 32 bits could be too large. Null if they do.
const char* conv_refusal(const ConvKernels& kernels, const ConvProblem& problem);

// All that the steps of one call share. A "k-block" is numbered through the convolution's groups.
struct ConvPlan {
  ConvPlan(const ConvKernels& kernels, const PruneKernels& prune_kernels, const ConvBackward& call);

  const ConvKernels& kernels;
  const PruneKernels& prune_kernels;
  const ConvBackward& call;
  const ConvProblem& problem;
  const int64_t p, q;
  const int64_t k_group;  // output channels of a convolution group
  const double density;  // of a sample of the gradient
  const AgbPlan agb;
  const WgcPlan wgc;

  // Whether the gradient is read through a buffer of pruned or converted values.
  bool staged() const {
    return call.prune || call.pruned || call.grad_output_planes || call.dtype != DType::kFloat32;
  }
  int64_t tile_rows() const;  // rows that are staged and listed at a time
  int64_t tile_floats() const { return tile_rows() * q * problem.k; }

  // Of rows of grad_input, see AgbPlan::band_rows.
  int64_t bands() const { return ceil_div(problem.h, agb.band_rows); }

  int64_t k_blocks() const { return problem.groups * agb.k_blocks; }
  int64_t k_begin(int64_t block) const {
    return block / agb.k_blocks * k_group + block % agb.k_blocks * agb.k_block;
  }
  int64_t k_size(int64_t block) const {
    const int64_t left = k_group - block % agb.k_blocks * agb.k_block;
    return left < agb.k_block ? left : agb.k_block;
  }

  // Rows and columns of the input under rows and columns of the gradient, for a window kernel.
  int64_t window_rows(int64_t rows) const { return (rows - 1) * problem.stride_h + problem.r; }
  int64_t window_columns() const { return (q - 1) * problem.stride_w + problem.s; }

  // Units of a range of images that begins with a whole block.
  int64_t units(Images images) const;
  Rows unit(Images images, int64_t index) const;

  // Images whose lists stay in a core's L2 cache together, whole panels.
  int64_t chunk_images() const;
};

}  // namespace sparsebwd
