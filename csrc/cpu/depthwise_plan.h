// SPDX-License-Identifier: Apache-2.0
// How a depthwise convolution is cut into blocks, tiles and taps.
#pragma once

#include <stdint.h>

#include <vector>

#include "depthwise_kernels.h"
#include "sparsebwd/conv_problem.h"

namespace sparsebwd {

// A tap r along one dimension, for inputs of one phase: the input at position i, that is row
// i * stride + phase, meets the gradient at i + shift.
struct DepthwiseTap {
  int64_t index, shift;
};

// One dimension. A stride splits the input into as many phases, each a convolution of stride 1.
struct DepthwiseAxis {
  DepthwiseAxis(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation);

  // Positions of a phase; the first one has the most.
  int64_t positions_of(int64_t phase) const { return (size - phase + stride - 1) / stride; }
  int64_t span() const { return most - least; }

  int64_t size, stride;
  int64_t positions;
  int64_t least = 0, most = 0;  // shifts
  std::vector<std::vector<DepthwiseTap>> phases;
};

// Taps that a kernel takes at once, of one phase of rows and one of columns.
struct DepthwiseChunk {
  int taps;  // 0: no tap reaches these pixels
  int32_t offsets[kMostTaps];
  int64_t first_tap;      // its number in DepthwisePlan::order
  int64_t least, most;    // shifts of rows
  int64_t rows, columns;  // positions of the phase
  int64_t row_phase, column_phase;
  int64_t x_offset;       // of the phase in the tile, in floats
  bool first;             // of the phase
};

// The tile of a block of channels, vector by vector, holds the gradient that a band of rows of each
// phase meets, with zeros where there is none, the band of the input, and that of its gradient:
//   g[vector][row][column][lane], x[vector][row phase][column phase][row][column][lane], dx as x.
// in_place: kernels read the input and write its gradient where these are, and have tiles of them only for
// what does not fill a vector.
struct DepthwisePlan {
  DepthwisePlan(const ConvProblem& problem, int lanes, bool in_place);

  int64_t vectors() const { return channels / lanes; }
  int64_t g_floats() const { return vectors() * g_stride; }
  int64_t x_floats() const { return vectors() * x_stride; }
  int64_t vector_taps() const { return taps * lanes; }
  // Weights of a block: [vector][multiple][tap][lane].
  int64_t block_floats() const { return vectors() * multiple * vector_taps(); }
  int64_t scratch_floats() const;

  int64_t lanes;
  bool in_place;
  DepthwiseAxis rows, columns;
  int64_t multiple;          // output channels of each input channel
  int64_t taps;              // elements of a filter
  std::vector<int64_t> order;  // of the taps: r * s + s
  std::vector<DepthwiseChunk> chunks;

  int64_t channels, blocks;  // of input channels
  int64_t groups;            // of images
  int64_t band;              // positions

  // Floats. Of pixels that are gathered or scattered, the places in the tile.
  int64_t g_pitch, g_stride, x_pitch, x_stride;
  std::vector<int32_t> g_offsets, x_offsets;

 private:
  void cut_into_blocks(const ConvProblem& problem);
  void list_chunks(const ConvProblem& problem);
  void place_pixels(const ConvProblem& problem);
};

}  // namespace sparsebwd
