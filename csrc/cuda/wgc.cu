// SPDX-License-Identifier: Apache-2.0
// WGC: dw[k][r][s][c] = sum over pixels of g[pixel][k] * x[pixel * stride + (r, s) - pad][c], in
// float32, by multiplying for the non-zeros of g only.
//
// Who does what. A warp owns 8 output channels, all taps and 64 input channels, two for each lane
// (1x1: 256, eight for each lane). Its sums stay in registers, 144 a lane (1x1: 64). A block is four
// warps, 32 output channels: one word of the mask for a pixel. It walks along `strip` pixels of a
// row of grad_output, then the same columns of the next row, through a range of rows that may span
// images. Blocks of one range lie next to each other in the grid, so that they read the same input
// at the same time.
//
// How. The value of g is the same for all lanes, the input differs. For each pixel with a non-zero
// in its byte of the mask, a warp holds the window of the input that the pixel sees in registers;
// if the pixel before was not empty, all but the newest columns are there already, and columns take
// registers in turn (kColumns), so that none is moved. Then for each of the 8 bits: branch around
// taps x taps x lane multiply-adds if it is 0. The branches are real and uniform: see compute_row.
// Runs of four pixels, and rows, without a non-zero are passed over.
//
// Input, values and masks come through shared memory. Rows of the input lie in a ring and are read
// once for each block; while a step of a few rows is computed, the next one is fetched, with one
// barrier a step. Values are fetched by groups of 8 channels, those without a non-zero never.
//
// Sums. When a warp has multiplied kChain values of any channel, it adds its registers to its own
// sums in the workspace. wgc_reduce adds those of all ranges in double precision. Nothing depends on
// the order in which threads run.
//
// Load balance. Warps of a block may differ in density; two blocks share a multiprocessor, therefore:
// while one waits at a barrier the other computes. Blocks may, too, since images differ; ranges are
// as long as choose_row_ranges finds best for blocks that do by a quarter.
//
// Cost, counted in the machine code for sm_90a (float32, 3x3, stride 1, rows of 56): instructions
// of a warp
//   18   for a non-zero
//   26   for a pixel that is not empty (16 of them test and branch), 11 more after an empty one
//   16   for a run of four pixels that is not empty, 2 more for each empty pixel in it
//   5.2  for any pixel: 93 for a row of 28 and 163 for three such rows to stage and set up
// and up to 2 % more to add sums to memory.
// At 4 instructions a clock and multiprocessor, against a dense kernel of 53 TFLOP/s on an H100 (161
// such instructions for the same work), that predicts, not measured, with nothing else in the way:
//   density   .4   .3   .2   .1   .05  .01
//   speed-up  1.7  2.1  2.6  3.9  5.8  15
// Shared memory is busy for 40 % (.4) to 92 % (.05) of that time.
#include <algorithm>

#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "plain.h"
#include "sparsebwd/integers.h"

namespace sparsebwd::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 2;     // on a multiprocessor: registers and shared memory are cut for two
constexpr int kGroup = 8;      // output channels of a warp: a byte of the mask
constexpr int kTileK = 32;     // output channels of a block: a word of the mask
constexpr int kRun = 4;        // pixels whose mask bytes a warp reads at once: a word
constexpr int kMostStrip = 32; // pixels of a row that a block walks along: a bit of a ballot for each
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
  int row_step, column_step;     // input rows and columns from one that is staged to the next
  int pad_h, pad_w;
  int strips, strip;             // a row of grad_output is `strips` times `strip` pixels
  int columns;                   // staged in a row
  int step_rows;                 // rows of grad_output in a step
  int ring_rows;                 // staged rows that shared memory holds
  int64_t rows;                  // of grad_output: n * p
  int64_t row_ranges;
  int c_tiles, k_tiles;

  __host__ __device__ int64_t ranges() const { return row_ranges * strips; }
  int64_t blocks() const { return ranges() * c_tiles * k_tiles; }
};

// One instance of the kernel: Taps x Taps filters that move on by Stride columns.
template <class Element, int Taps_, int Stride_>
struct Kernel {
  using T = Element;
  static constexpr int kTaps = Taps_;
  static constexpr int kStride = Stride_;
  static constexpr int kLane = kTaps == 1 ? 8 : 2;  // input channels of a lane
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
  static constexpr int kBatch = kTaps == 1 ? 32 : kStride == 1 ? 36 : 18;
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

template <class K>
__device__ __forceinline__ void load_column(typename K::Column& column,
                                            const unsigned char* const (&rows)[K::kTaps], int index) {
#pragma unroll
  for (int r = 0; r < K::kTaps; ++r)
#pragma unroll
    for (int v = 0; v < K::kVectors; ++v) {
      using V = Vector<typename K::T, K::kVector>;
      const V x = *reinterpret_cast<const V*>(rows[r] + index * K::kPixelBytes +
                                              v * 32 * static_cast<int>(sizeof(V)));
#pragma unroll
      for (int e = 0; e < K::kVector; ++e)
        column.x[r][v * K::kVector + e] = to_float(x.element[e]);
    }
}

template <class K>
__device__ __forceinline__ void load_values(float (&values)[kGroup], const unsigned char* from) {
  using V = Vector<typename K::T, K::kChunk>;
#pragma unroll
  for (int v = 0; v < kGroup / K::kChunk; ++v) {
    const V chunk = reinterpret_cast<const V*>(from)[v];
#pragma unroll
    for (int e = 0; e < K::kChunk; ++e) values[v * K::kChunk + e] = to_float(chunk.element[e]);
  }
}

// What a block of the grid does: a part of the result, from a range of rows of a strip.
template <class K>
class Walk {
  using T = typename K::T;
  static constexpr int kBytes = sizeof(T);

 public:
  __device__ Walk(const Plan& plan, const T* g, const uint32_t* nonzeros, const T* x)
      : plan_(plan), shared_(K::shared(plan)) {
    const unsigned tiles = plan.c_tiles * plan.k_tiles;
    const int k_tile = blockIdx.x % plan.k_tiles;
    const int k0 = k_tile * kTileK;
    const int c0 = blockIdx.x % tiles / plan.k_tiles * K::kTileC;
    const int range = blockIdx.x / tiles;
    const int64_t row_range = range / plan.strips;
    const int64_t row = plan.rows * row_range / plan.row_ranges;
    rows_ = static_cast<int>(plan.rows * (row_range + 1) / plan.row_ranges - row);

    const int q0 = range % plan.strips * plan.strip;
    const int width = plan.q - q0 < plan.strip ? plan.q - q0 : plan.strip;
    const int pixel = threadIdx.x % plan.strip;
    pixel_row_ = threadIdx.x / plan.strip;
    pixel_offset_ = pixel_row_ * plan.q + pixel;
    const int64_t first_pixel = row * plan.q + q0;
    const int k_words = (plan.k + 31) / 32;
    mask_ = nonzeros + (first_pixel + pixel_offset_) * k_words + k_tile;
    has_pixel_ = pixel_row_ < plan.step_rows && pixel < width;
    // Of a group that only half exists, as with float32 it may, the other half is not to be read.
    g_ = g + first_pixel * plan.k +
         min(k0 + lane() % kValueChunks * K::kChunk, plan.k - K::kChunk);

    p_ = static_cast<int>(row % plan.p);
    stage_row_ = p_ * plan.stage_stride;
    stage_end_ = stage_row_ + K::kTaps;
    const int c = c0 + static_cast<int>(threadIdx.x) % kInputChunks * K::kChunk;
    const int first = threadIdx.x / kInputChunks, columns = (width - 1) * K::kStride + K::kTaps;
    const int input_column = (q0 * K::kStride + first) * plan.column_step - plan.pad_w;
    for (int pass = 0; first + pass * kInputColumns < columns; ++pass) {
      const int at = input_column + pass * kInputColumns * plan.column_step;
      if (at >= 0 && at < plan.w && c < plan.c) inside_ |= 1u << pass;
    }
    pass_bytes_ = kInputColumns * plan.column_step * plan.c * kBytes;
    const int64_t input_row = row / plan.p * plan.h + stage_row_ * plan.row_step - plan.pad_h;
    input_ = reinterpret_cast<const unsigned char*>(x) +
             ((input_row * plan.w + input_column) * plan.c + c) * kBytes;
  }

  // All steps, one barrier each. While one is computed, the input and the values of the next are on
  // their way to shared memory, and the masks of the one after that to registers.
  __device__ __forceinline__ void run(float* partials) {
    clear(0, shared_.values);
    clear(shared_.masks, shared_.bytes);
    __syncthreads();
    const int step = plan_.step_rows;
    stage(rows_, 0, load_mask(rows_));
    uint32_t mask = load_mask(rows_ - step);
    typename K::Sums sums = {};
    float* const memory = partials + static_cast<int64_t>(blockIdx.x) * K::kBlockSums +
                          (warp() * K::kSums * 32 + lane() * K::kStore);
    bool first = true;
    for (int left = rows_, buffer = 0; left > 0; left -= step, buffer ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      stage(left - step, buffer ^ 1, mask);
      mask = load_mask(left - 2 * step);
      compute(left < step ? left : step, buffer, sums);
      if (longest() >= kChain || left <= step) {
        add_to(memory, sums, first);
        first = false;
      }
    }
  }

 private:
  static constexpr int kValueChunks = kTileK / K::kChunk;  // 16 bytes each, of a pixel
  static constexpr int kInputChunks = K::kPixelBytes / 16;
  static constexpr int kInputColumns = kThreads / kInputChunks;  // copied in a pass
  static constexpr int kInputPasses =                            // at most, of a row
      ((kMostStrip - 1) * K::kStride + K::kTaps + kInputColumns - 1) / kInputColumns;
  static_assert(kInputPasses <= 32, "a bit for each");

  static __device__ int warp() { return threadIdx.x / 32; }
  static __device__ int lane() { return threadIdx.x % 32; }

  // These bytes of shared memory.
  static __device__ void clear(unsigned begin, unsigned end) {
    for (unsigned at = begin + threadIdx.x * 16; at < end; at += kThreads * 16)
      *reinterpret_cast<Vector<uint32_t, 4>*>(dynamic_shared() + at) = {};
  }

  // The mask word of this thread's pixel in the next step, which has `left` rows or plan_.step_rows,
  // whichever is less; 0 where there is no such pixel.
  __device__ uint32_t load_mask(int left) {
    const uint32_t mask = has_pixel_ && pixel_row_ < left ? *mask_ : 0;
    mask_ += plan_.step_rows * static_cast<int64_t>(plan_.q) * ((plan_.k + 31) / 32);
    return mask;
  }

  // Starts the copies for the next step: the input rows that the step before did not see, and the
  // values. `mask` is that of this thread's pixel.
  __device__ __forceinline__ void stage(int left, int buffer, uint32_t mask) {
    if (left <= 0) return;
    stage_masks(buffer, mask);
    stage_values(buffer, mask);
#pragma unroll 1
    for (int rows = left < plan_.step_rows ? left : plan_.step_rows; rows > 0; --rows) stage_input();
    cp_async_commit();
  }

  __device__ __forceinline__ void stage_masks(int buffer, uint32_t mask) const {
    if (!has_pixel_) return;
    unsigned char* const to = dynamic_shared() + shared_.masks + buffer * shared_.mask_bytes +
                              pixel_offset_ + pixel_row_ * (kMostStrip - plan_.q);
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      to[w * (shared_.mask_bytes / kWarps)] = static_cast<unsigned char>(mask >> (8 * w));
  }

  // A warp copies the values of its lanes' pixels, for all warps. A group that has no set bit is not
  // read.
  __device__ __forceinline__ void stage_values(int buffer, uint32_t mask) {
    unsigned char* const to =
        in_register(dynamic_shared() + shared_.values + buffer * shared_.value_bytes +
                    (threadIdx.x - lane()) * (kTileK * kBytes) + lane() * 16);
    const unsigned pixel_bytes = plan_.k * kBytes;
    const uint32_t group = 255u << (lane() % kValueChunks * K::kChunk / kGroup * kGroup);
#pragma unroll
    for (int pass = 0; pass < kValueChunks; ++pass) {
      const int owner = pass * (32 / kValueChunks) + lane() / kValueChunks;
      const uint32_t bits = __shfl_sync(~0u, mask, owner);
      const unsigned offset = __shfl_sync(~0u, pixel_offset_, owner);
      if (bits & group)
        cp_async16(to + pass * 512, reinterpret_cast<const unsigned char*>(g_) +
                                        static_cast<uint64_t>(offset) * pixel_bytes);
    }
    g_ += plan_.step_rows * static_cast<int64_t>(plan_.q) * plan_.k;
  }

  // The rows of the input that the next row of grad_output sees and the one before did not. Rows
  // outside of the image are cleared; columns outside, and channels that the input does not have, are
  // never written to: they are the zeros that the ring begins with.
  __device__ __forceinline__ void stage_input() {
    const int64_t row_bytes = static_cast<int64_t>(plan_.w) * plan_.c * kBytes;
#pragma unroll 1
    do {
      unsigned char* const to = in_register(
          dynamic_shared() + stage_slot_ * plan_.columns * K::kPixelBytes + threadIdx.x * 16);
      if (static_cast<unsigned>(stage_row_ * plan_.row_step - plan_.pad_h) <
          static_cast<unsigned>(plan_.h)) {
#pragma unroll
        for (int pass = 0; pass < kInputPasses; ++pass)
          if (inside_ >> pass & 1u)
            cp_async16(to + pass * kThreads * 16, input_ + static_cast<uint64_t>(pass_bytes_) * pass);
      } else {
        // Not by cp.async, which could: with a size that varies it is four instructions.
#pragma unroll
        for (int pass = 0; pass < kInputPasses; ++pass)
          if (inside_ >> pass & 1u)
            *reinterpret_cast<Vector<uint32_t, 4>*>(to + pass * kThreads * 16) = {};
      }
      if (++stage_slot_ == plan_.ring_rows) stage_slot_ = 0;
      input_ += plan_.row_step * row_bytes;
    } while (++stage_row_ < stage_end_);
    if (stage_end_ == plan_.stage_rows) {
      stage_row_ = 0;
      stage_end_ = K::kTaps;
      input_ += (plan_.h - plan_.stage_rows * static_cast<int64_t>(plan_.row_step)) * row_bytes;
    } else {
      stage_end_ += plan_.stage_stride;
    }
  }

  __device__ __forceinline__ void compute(int rows, int buffer, typename K::Sums& sums) {
    unsigned char* const shared = dynamic_shared();
    const unsigned char* masks =
        in_register(shared + shared_.masks + buffer * shared_.mask_bytes +
                    warp() * (shared_.mask_bytes / kWarps));
    const unsigned char* values = in_register(
        shared + shared_.values + buffer * shared_.value_bytes + warp() * kGroup * kBytes);
    unsigned char* const ring = in_register(shared + lane() * K::kVector * kBytes);
    for (; rows > 0; --rows) {
      compute_row(masks, values, ring, sums);
      masks += kMostStrip;
      values += plan_.strip * (kTileK * kBytes);
      const bool last = p_ + 1 == plan_.p;
      p_ = last ? 0 : p_ + 1;
      slot_ = wrap(slot_ + (last ? K::kTaps : plan_.stage_stride));
    }
  }

  // The place in the ring of a row that is less than a ring after it.
  __device__ unsigned wrap(unsigned slot) const {
    const unsigned wrapped = slot - plan_.ring_rows;
    return slot < wrapped ? slot : wrapped;  // the one that is not negative
  }

  // Adds what the pixels of one row of the strip contribute. `ring`: where this lane's channels of the
  // first row of the ring are.
  __device__ __forceinline__ void compute_row(const unsigned char* masks, const unsigned char* values,
                                              unsigned char* ring, typename K::Sums& sums) {
    typename K::Column columns[K::kColumns];
    float value[2][kGroup];
    const unsigned char own = masks[31 - lane()];
    const uint32_t pixels = __ballot_sync(~0u, own != 0);  // bit 31 - i: pixel i has a non-zero
    if (pixels == 0) return;
    // Each bit of a nibble into a byte.
    counts_[0] += (own & 15) * 0x00204081 & 0x01010101;
    counts_[1] += (own >> 4) * 0x00204081 & 0x01010101;
    unsigned char* input[K::kTaps];
#pragma unroll
    for (int r = 0; r < K::kTaps; ++r)
      input[r] = in_register(ring + wrap(slot_ + r) * (plan_.columns * K::kPixelBytes));
    int next = __clz(pixels) & -kRun;
    uint32_t loaded = *reinterpret_cast<const uint32_t*>(masks + next);
    for (bool more = true; more;) {
      const int first = next;
      // All lanes have the same word. This tells the compiler that they do, so that it branches
      // without caring for lanes that might go another way, as `pixels` being a vote does.
      const uint32_t mask = __reduce_or_sync(~0u, loaded);
      // Bit 31: of the pixel before the run, of the one after it.
      const uint32_t before = pixels >> 1 << first, after = pixels << first << kRun;
      more = after != 0;
      next = first + kMostStrip - ((31 - __clz(after)) & -kRun);
      if (more) loaded = *reinterpret_cast<const uint32_t*>(masks + next);
      const unsigned char* const run_values = values + first * (kTileK * kBytes);
      const unsigned char* run_input[K::kTaps];
#pragma unroll
      for (int r = 0; r < K::kTaps; ++r)
        run_input[r] = in_register(input[r] + first * (K::kStride * K::kPixelBytes));
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if ((mask >> (8 * i) & 255u) == 0) continue;
        if (((i == 0 ? before >> 31 : mask >> (8 * (i - 1))) & 255u) == 0) {
          load_values<K>(value[i % 2], run_values + i * kTileK * kBytes);
#pragma unroll
          for (int s = 0; s < K::kTaps; ++s)
            load_column<K>(columns[(i * K::kStride + s) % K::kColumns], run_input, i * K::kStride + s);
        }
        if (((i + 1 == kRun ? after >> 31 : mask >> (8 * (i + 1))) & 255u) != 0) {
          load_values<K>(value[(i + 1) % 2], run_values + (i + 1) * kTileK * kBytes);
#pragma unroll
          for (int s = 0; s < K::kStride; ++s) {
            const int index = i * K::kStride + K::kTaps + s;
            load_column<K>(columns[index % K::kColumns], run_input, index);
          }
        }
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          if (mask >> (8 * i + k) & 1u) {
#pragma unroll
            for (int r = 0; r < K::kTaps; ++r)
#pragma unroll
              for (int s = 0; s < K::kTaps; ++s)
#pragma unroll
                for (int c = 0; c < K::kLane; ++c)
                  sums[k][r][s][c] =
                      fmaf(value[i % 2][k], columns[(i * K::kStride + s) % K::kColumns].x[r][c],
                           sums[k][r][s][c]);
          }
        }
      }
    }
  }

  // Adds the sums to those in memory, of which there are none the first time, and goes on from 0.
  __device__ __forceinline__ void add_to(float* memory, typename K::Sums& sums, bool first) {
    constexpr int kBatch = K::kBatch, kStores = kBatch / K::kStore;
    float* const flat = &sums[0][0][0][0];
#pragma unroll
    for (int begin = 0; begin < K::kSums; begin += kBatch) {
      __syncwarp();  // so that the compiler loads no further batch
      auto* const at = reinterpret_cast<typename K::Store*>(memory + begin * 32);
      typename K::Store batch[kStores] = {};
      if (!first) {
#pragma unroll
        for (int i = 0; i < kStores; ++i) batch[i] = at[i * 32];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        batch[i / K::kStore].element[i % K::kStore] += flat[begin + i];
        flat[begin + i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kStores; ++i) at[i * 32] = batch[i];
    }
    counts_[0] = counts_[1] = 0;
  }

  // How many values of a channel, at most, were multiplied since sums were last added to memory.
  __device__ uint32_t longest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = __reduce_add_sync(~0u, counts_[i / 2] >> i % 2 * 8 & 0x00ff00ff);
      most = max(most, max(two & 0xffff, two >> 16));
    }
    return most;
  }

  // Of this lane's pixel of all rows: values that were multiplied since sums were last added to memory,
  // a byte for each channel. It holds what kChain - 1 and a step of kThreads rows come to.
  uint32_t counts_[2] = {};
  static_assert(kChain - 1 + kThreads <= 255, "");
  const Plan& plan_;
  const typename K::Shared shared_;
  int rows_;  // of grad_output, that the block walks through
  int pixel_row_, pixel_offset_;  // of this thread's pixel in each step, from the first
  bool has_pixel_;
  const uint32_t* mask_;  // where the next one is
  const T* g_;  // first pixel of the next step to stage, this lane's channels, or the last ones
  // The next input row to stage: its place in its image, where the rows that the next row of
  // grad_output sees end, its place in the ring. This thread stages 16 bytes of a row in each of its
  // passes, those of which columns and channels are inside the image.
  int stage_row_, stage_end_, stage_slot_ = 0;
  uint32_t inside_ = 0;
  unsigned pass_bytes_;  // from what it copies in a pass to what it does in the next
  const unsigned char* input_;  // in the first pass, if it is inside
  // The next row to compute: its place in its image, the ring row that it sees first.
  int p_;
  unsigned slot_ = 0;
};

// partials: kBlockSums for each block.
template <class K>
__global__ void __launch_bounds__(kThreads, kBlocks)
    wgc_kernel(const Plan plan, const typename K::T* g, const uint32_t* nonzeros,
               const typename K::T* x, float* partials) {
  Walk<K>(plan, g, nonzeros, x).run(partials);
}

constexpr int kReduceThreads = 256;

// The sums over ranges, in the order of memory. Each thread takes one of the `slices` parts of the
// ranges, the threads of a part neighbouring sums; the first part adds up the others.
template <class K>
__global__ void __launch_bounds__(kReduceThreads)
    wgc_reduce(const Plan plan, int slices, const float* partials, typename K::T* result,
               const Strides strides) {
  const unsigned width = kReduceThreads / slices, slice = threadIdx.x / width;
  const unsigned blocks = K::kBlockSums / width;  // for a tile
  const unsigned tile = blockIdx.x / blocks;
  unsigned index = blockIdx.x % blocks * width + threadIdx.x % width;
  const float* const from = partials + static_cast<int64_t>(tile) * K::kBlockSums + index;
  const int64_t range_sums = static_cast<int64_t>(plan.c_tiles) * plan.k_tiles * K::kBlockSums;
  const int64_t end = plan.ranges() * (slice + 1) / slices;
  double sum = 0;
#pragma unroll 4
  for (int64_t range = plan.ranges() * slice / slices; range < end; ++range)
    sum += static_cast<double>(from[range * range_sums]);
  double* const parts = reinterpret_cast<double*>(dynamic_shared());
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0) return;
  for (int i = 1; i < slices; ++i) sum += parts[i * width + threadIdx.x];

  // Where it belongs: index is [warp][k][r][s][vector of a lane][lane][element].
  const auto next = [&](unsigned size) {
    const int digit = static_cast<int>(index % size);
    index /= size;
    return digit;
  };
  const int element = next(K::kStore), owner = next(32);
  const int vector = next(K::kLane / K::kStore) * K::kStore;
  const int s = next(K::kTaps), r = next(K::kTaps);
  const int64_t k = tile % plan.k_tiles * static_cast<int64_t>(kTileK) + index;
  const int64_t c = tile / plan.k_tiles * static_cast<int64_t>(K::kTileC) +
                    (vector / K::kVector * 32 + owner) * K::kVector + vector % K::kVector + element;
  if (k < plan.k && c < plan.c)
    result[k * strides.n + c * strides.c + r * strides.h + s * strides.w] =
        from_float<typename K::T>(static_cast<float>(sum));
}

// Fills as many waves of blocks as is best by this model, in units of the time for a pixel: writing
// and adding up its sums costs a range 256, and ranges may differ so much in density that the
// last ones make the rest of the device wait for a quarter of a range.
int64_t choose_row_ranges(int64_t rows, int64_t strip, int64_t tiles, int64_t slots) {
  int64_t best = 1;
  double best_cost = 0;
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t ranges = std::max<int64_t>(1, std::min(rows, waves * slots / tiles));
    const double length = static_cast<double>(ceil_div(rows, ranges) * strip);
    const double cost =
        static_cast<double>(ceil_div(ranges * tiles, slots)) * (length + 256) + length / 4;
    if (waves == 1 || cost < best_cost) {
      best = ranges;
      best_cost = cost;
    }
  }
  return best;
}

template <class K>
Plan make_plan(const ConvProblem& problem, const Device& device) {
  Plan plan = {};
  plan.c = static_cast<int>(problem.c);
  plan.h = static_cast<int>(problem.h);
  plan.w = static_cast<int>(problem.w);
  plan.k = static_cast<int>(problem.k);
  plan.p = static_cast<int>(problem.p());
  plan.q = static_cast<int>(problem.q());
  const bool pointwise = K::kTaps == 1;
  plan.stage_stride = pointwise ? 1 : static_cast<int>(problem.stride_h);
  plan.stage_rows = (plan.p - 1) * plan.stage_stride + K::kTaps;
  plan.row_step = pointwise ? static_cast<int>(problem.stride_h) : 1;
  plan.column_step = pointwise ? static_cast<int>(problem.stride_w) : 1;
  plan.pad_h = static_cast<int>(problem.pad_h);
  plan.pad_w = static_cast<int>(problem.pad_w);
  plan.rows = problem.n * plan.p;
  plan.c_tiles = static_cast<int>(ceil_div(plan.c, K::kTileC));
  plan.k_tiles = static_cast<int>(ceil_div(plan.k, kTileK));

  const int most = std::min(device.shared_per_block, device.shared_per_multiprocessor / kBlocks - 1024);
  const auto fits = [&](int step_rows) {
    plan.step_rows = step_rows;
    // What two steps see: their rows, and the halo of each image that they meet.
    const int64_t images = ceil_div(2 * step_rows - 1, plan.p) + 1;
    plan.ring_rows = static_cast<int>((2 * step_rows - images) * plan.stage_stride + images * K::kTaps);
    return K::shared(plan).bytes <= static_cast<size_t>(most);
  };
  const int64_t fewest = ceil_div(plan.q, kMostStrip);
  plan.strip = static_cast<int>(ceil_div(ceil_div(plan.q, fewest), kRun) * kRun);
  for (;; plan.strip -= kRun) {
    plan.columns = (plan.strip - 1) * K::kStride + K::kTaps;
    if (fits(1) || plan.strip == kRun) break;
  }
  plan.strips = static_cast<int>(ceil_div(plan.q, plan.strip));
  int step_rows = kThreads / plan.strip;
  while (step_rows > 1 && !fits(step_rows)) --step_rows;
  fits(step_rows);

  const int64_t tiles = static_cast<int64_t>(plan.c_tiles) * plan.k_tiles * plan.strips;
  plan.row_ranges = choose_row_ranges(plan.rows, plan.strip, std::max<int64_t>(tiles, 1),
                                      static_cast<int64_t>(device.multiprocessors) * kBlocks);
  return plan;
}

// Calls f(K()) for the kernel that runs the problem.
template <class F>
auto with_kernel(const ConvProblem& problem, DType dtype, F&& f) {
  return with_element(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (problem.r == 1) return f(Kernel<T, 1, 1>());
    if (problem.stride_w == 1) return f(Kernel<T, 3, 1>());
    return f(Kernel<T, 3, 2>());
  });
}

bool is_sparse(const ConvCall& call) {
  const ConvProblem& problem = call.problem;
  return problem.n > 0 && wgc_refusal(problem, call.dtype) == nullptr && call.nonzeros != nullptr &&
         is_aligned(call.grad_output, 16) && is_aligned(call.operand, 16) &&
         is_channels_last(call.grad_output_strides, problem.n, problem.k, problem.p(), problem.q()) &&
         is_channels_last(call.operand_strides, problem.n, problem.c, problem.h, problem.w);
}

}  // namespace

const char* wgc_refusal(const ConvProblem& problem, DType dtype) {
  const bool pointwise = problem.r == 1 && problem.s == 1;
  if (!pointwise && !(problem.r == 3 && problem.s == 3)) return "the filter is neither 3x3 nor 1x1";
  if (!pointwise && (problem.stride_h > 2 || problem.stride_w > 2))
    return "the stride of a 3x3 filter is above 2";
  if (!pointwise && (problem.dil_h != 1 || problem.dil_w != 1)) return "the filter is dilated";
  if (problem.groups != 1) return "the convolution is in groups";
  const int64_t chunk = 16 / dtype_size(dtype);
  if (problem.c % chunk != 0 || problem.k % chunk != 0)
    return dtype == DType::kFloat32 ? "the numbers of channels are not multiples of 4"
                                    : "the numbers of channels are not multiples of 8";
  constexpr int64_t kMost = 1 << 24;
  for (const int64_t size : {problem.c * problem.stride_w, problem.k, problem.stride_h,
                             problem.h + 2 * problem.pad_h, problem.w + 2 * problem.pad_w})
    if (size > kMost) return "a size is above 16777216";
  // A block counts its rows of grad_output in 32 bits. The grid has blocks for each strip and tile at
  // least, with sums of their own.
  if (problem.n * problem.p() > INT32_MAX) return "grad_output has more than 2^31 rows";
  if (ceil_div(problem.c, pointwise ? 256 : 64) * ceil_div(problem.k, kTileK) *
          ceil_div(problem.q(), kRun) > 1 << 20)
    return "rows are too long for so many channels";
  return nullptr;
}

size_t wgc_workspace(const ConvCall& call, const Device& device) {
  if (!is_sparse(call)) return 0;
  return with_kernel(call.problem, call.dtype, [&](auto kernel) {
    using K = decltype(kernel);
    const Plan plan = make_plan<K>(call.problem, device);
    return static_cast<size_t>(plan.blocks() * K::kBlockSums) * sizeof(float);
  });
}

cudaError_t wgc(const ConvCall& call, const Device& device, cudaStream_t stream) {
  if (!is_sparse(call)) return wgc_plain(call, stream);
  return with_kernel(call.problem, call.dtype, [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::T;
    const Plan plan = make_plan<K>(call.problem, device);
    float* const partials = static_cast<float*>(call.workspace);
    LaunchShape shape = {};
    shape.grid = dim3(static_cast<unsigned>(plan.blocks()));
    shape.block = dim3(kThreads);
    shape.shared = K::shared(plan).bytes;
    shape.prefers = Prefers::kShared;  // for kBlocks; what goes through the L1 cache is not read again
    const cudaError_t error =
        launch(wgc_kernel<K>, shape, stream, plan, static_cast<const T*>(call.grad_output), call.nonzeros,
               static_cast<const T*>(call.operand), partials);
    if (error != cudaSuccess) return error;
    const int slices = plan.ranges() < 32 ? 1 : 8;
    LaunchShape reduction = {};
    reduction.grid = dim3(static_cast<unsigned>(plan.blocks() / plan.ranges() * K::kBlockSums /
                                                (kReduceThreads / slices)));
    reduction.block = dim3(kReduceThreads);
    reduction.shared = kReduceThreads * sizeof(double);
    return launch(wgc_reduce<K>, reduction, stream, plan, slices, partials,
                  static_cast<T*>(call.result), call.result_strides);
  });
}

}  // namespace sparsebwd::cuda
