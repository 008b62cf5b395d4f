// SPDX-License-Identifier: Apache-2.0
// Of K3 (wgc.cu): tile sizes, and how the work is cut.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace sparsebwd::cuda {
namespace {

constexpr int kThreads = 128;  // and pixels of a step, at most
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 2;  // on a multiprocessor: registers and shared memory are cut for two
constexpr int kRun = 4;  // pixels whose mask bytes a warp reads at once: a word
constexpr int kMostStrip =
    32;  // pixels of a row that a block walks along: a bit of a ballot for each
// Sums of float32 get less accurate as they get longer. After so many values of a channel those in
// registers are added to those in memory. Dense kernels of CPUs are not twice as accurate then; it takes
// up to 2 % of the instructions.
constexpr int kChain = 128;

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

// How the work is cut, from the host.
struct Plan {
  int c, h, w, k, p, q;
  // The input is staged in rows and columns of which each output pixel sees Taps, and moves on by
  // `stage_stride` rows: those of the padded input, or for 1x1 only the ones that are seen.
  int stage_stride, stage_rows;  // stage_rows: of an image
  int row_step, column_step;  // input rows and columns from one that is staged to the next
  int pad_h, pad_w;
  int strips, strip;  // a row of grad_output is `strips` times `strip` pixels
  int columns;  // staged in a row
  int step_rows;  // rows of grad_output in a step
  int ring_rows;  // staged rows that shared memory holds
  int rows;  // of grad_output: n * p
  int pixel_bytes;  // staged, from what a pixel sees first to what the next one does
  int c_tiles, k_tiles, tile_k;  // tile_k: output channels of a tile, 32 or 16
  int parts;  // that the steps of all sequences are cut into

  // Of the mask of a pixel, the bits of a tile, where its word is loaded by `load(index)`.
  template <class Load>
  __device__ __forceinline__ uint32_t tile_bits(int tile, Load load) const {
    const int first = tile * tile_k;
    return load(first / 32) >> first % 32 & ~0u >> (32 - tile_k);
  }
  __host__ __device__ int words() const { return (k + 31) / 32; }
  // A sequence is a strip of all rows, for a tile of k; a step is one of its rows.
  __host__ __device__ int sequences() const { return k_tiles * strips; }
  __host__ __device__ int steps() const { return rows * sequences(); }
  // What a part has of a sequence is a piece: a part has one of each sequence from that of its first
  // step to that of the first step after it, without rows perhaps. Numbers have no gaps:
  __host__ __device__ int64_t piece(int part, int sequence) const {
    return int64_t(part) + sequence;
  }
  __host__ __device__ int64_t pieces() const { return int64_t(parts) + sequences() - 1; }
};

// One instance of the kernel: Taps x Taps filters that move on by Stride columns; Lane input channels of a lane.
template <class Element, int Taps_, int Stride_, int Lane_>
struct Kernel {
  using T = Element;
  static constexpr int kTaps = Taps_;
  static constexpr int kStride = Stride_;
  static constexpr int kLane = Lane_;
  // Output channels of a warp: as many as there are registers for sums of, 144 of 3x3 filters.
  static constexpr int kGroup = kTaps == 1 ? 8 : 16 / kLane;
  static constexpr int kTileK = kWarps * kGroup;  // and of a block
  static constexpr int kTileC = 32 * kLane;
  // A lane's channels are vectors, those of neighbouring lanes side by side.
  static constexpr int kVector = std::min<int>(kLane, 16 / sizeof(T));
  static constexpr int kVectors = kLane / kVector;
  static constexpr int kStore = std::min(kVector, 4);  // sums that are written at once
  static constexpr int kPixelBytes = kTileC * sizeof(T);
  static constexpr int kChunk = 16 / sizeof(T);  // elements of an asynchronous copy
  // Column j of a run of pixels is kept in registers j % kColumns: the columns of one pixel and those
  // that the next one sees first; a run moves on by a multiple of it.
  static constexpr int kColumns = kStride == 1 ? 4 : 8;
  static_assert(kRun * kStride % kColumns == 0 && kColumns >= kTaps + kStride, "");

  struct Column {
    float x[kTaps][kLane];
  };
  // Of a lane. In memory, those of a block are [warp][vector of kStore sums][lane].
  using Sums = float[kGroup][kTaps][kTaps][kLane];
  using Store = Vector<float, kStore>;
  static constexpr int kSums = kGroup * kTaps * kTaps * kLane;
  static constexpr int kBlockSums = kThreads * kSums;
  // Those that are loaded at once, to add to them: as many as there are registers for.
  static constexpr int kBatch = kTaps == 1 ? 32 : kLane == 4 ? 12 : kStride == 1 ? 36 : 18;
  static_assert(kSums % kBatch == 0 && kBatch % kStore == 0, "");

  struct Shared {
    size_t masks, values, bytes;
    int mask_bytes;  // of a step: for each warp and row kMostStrip, of which zeros end it
    int value_bytes;
  };
  static __host__ __device__ Shared shared(const Plan& plan) {
    Shared s;
    s.mask_bytes = plan.step_rows * kMostStrip * kWarps;
    s.value_bytes = plan.step_rows * plan.strip * kTileK * static_cast<int>(sizeof(T));
    s.values = static_cast<size_t>(plan.ring_rows) * plan.columns * kPixelBytes;
    s.masks = s.values + 2 * s.value_bytes;
    s.bytes = s.masks + 2 * s.mask_bytes;
    return s;
  }
};

}  // namespace
}  // namespace sparsebwd::cuda
