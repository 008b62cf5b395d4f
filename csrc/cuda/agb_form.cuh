// SPDX-License-Identifier: Apache-2.0
// Of K2 (agb.cu): tile sizes, and how the work is cut.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace sparsebwd::cuda {
namespace {

constexpr int kWarps = 12;  // of a block, one on a multiprocessor: 168 registers a thread
constexpr int kThreads = 32 * kWarps;
constexpr int kFewSteps = 24;   // a warp with fewer shares them with another
// Pixels of a strip that one branch passes by, if all are zeros: as many as there are predicates for
// tests that compilers make early.
constexpr int kGroup = 6;
// Sums of float32 get less accurate as they get longer. After so many values of a pixel, each of which
// gives Taps products to a sum, they are put aside. Dense kernels of CPUs are not twice as accurate then.
constexpr int kChain = 32;
constexpr uint32_t kAll = ~0u;

// One compiled form of the kernel: Taps x Taps filters of which the outer ones stick out at the
// edge of the image, moved on by Stride; a warp has Columns of grad_input and 32 * Lane channels.
template <class Element, int Taps, int Stride, int Columns, int Lane>
struct Form {
  using T = Element;
  static constexpr int kTaps = Taps, kStride = Stride, kColumns = Columns, kLane = Lane;
  static constexpr int kPad = (Taps - 1) / 2;
  // Gradient pixel j of a strip reaches columns kStride * j - kOffset + tap; the strip sees kPixels
  // of them, kBefore of which lie before the one that belongs to its first column.
  static constexpr int kBefore = (Taps - 1 - kPad) / Stride;
  static constexpr int kOffset = Stride * kBefore + kPad;
  static constexpr int kPixels = (Columns - 1 + kOffset) / Stride + 1;
  // Rows of gradients before a row that also reach what this one completes.
  static constexpr int kLead = (Taps - 1) / Stride;
  static constexpr int kRows = std::max(Taps, Stride);
  static constexpr int kChannels = 32 * Lane;
  static constexpr int kWeights = Lane * Taps * Taps;  // of a lane, for one k
  static constexpr int kPack = 32 * kWeights;
  static constexpr int kVector = kWeights % 4 == 0 ? 4 : 2;  // of them, that a lane loads at once
  static constexpr int kRowFloats = Columns * kChannels;  // sums of a row of a strip
  static constexpr int kAside = kTaps * kRowFloats;  // that a warp puts aside
  // Floats of a channel's values in shared memory: whole vectors, an odd number of them, so that lanes
  // which write rows of it next to each other meet in no bank.
  static constexpr int kValues = ((kPixels + 3) / 4 | 1) * 4;
  static_assert(Columns % Stride == 0 && Columns <= 32 && kPixels <= 32 && kWeights % 2 == 0, "");

  using Sums = float[kRows][kColumns][kLane];
  // Sums of a column that are put aside at once.
  static constexpr int kStore = std::min(Lane, 4);
  struct alignas(sizeof(float) * kStore) Store {
    float sum[kStore];
  };
};

// How the work is cut, from the host.
struct Plan {
  int n, c, h, w, k, p, q;
  uint32_t pixel_bytes;
  int words;  // of the mask of a pixel
  int image_columns;  // from the first column of an image to that of the next, gap included
  int image_pixels;  // the same in columns of grad_output
  int strip_steps;  // gradient rows that complete all rows of a strip
  int steps;  // of all strips
  int sharers;  // warps that have the same rows, each every sharers-th word of k
  int tile_blocks;  // blocks for a tile of channels
  int parts;  // that steps are cut into: those of a tile's blocks
  bool together;  // warps of a block wait for each other at each row
  int shared_floats;  // of shared memory, of a warp: values, and a row of sums if others add it up
};

}  // namespace
}  // namespace sparsebwd::cuda
