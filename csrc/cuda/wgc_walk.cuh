// SPDX-License-Identifier: Apache-2.0
// The main loop of K3 (wgc.cu): a block walks along its rows, stages them in shared memory, and adds up.
#pragma once

#include "element.cuh"
#include "wgc_form.cuh"

namespace sparsebwd::cuda {
namespace {

template <class K>
__device__ __forceinline__ void load_column(typename K::Column& column,
                                            const unsigned char* const (&rows)[K::kTaps],
                                            int index) {
#pragma unroll
  for (int r = 0; r < K::kTaps; ++r)
#pragma unroll
    for (int v = 0; v < K::kVectors; ++v) {
      using V = Vector<typename K::T, K::kVector>;
      const V x = *reinterpret_cast<const V*>(rows[r] + index * K::kPixelBytes +
                                              v * 32 * static_cast<int>(sizeof(V)));
#pragma unroll
      for (int e = 0; e < K::kVector; ++e) column.x[r][v * K::kVector + e] = to_float(x.element[e]);
    }
}

template <class K>
__device__ __forceinline__ void load_values(float (&values)[K::kGroup], const unsigned char* from) {
  constexpr int kLoad = K::kGroup < K::kChunk ? K::kGroup : K::kChunk;
  using V = Vector<typename K::T, kLoad>;
#pragma unroll
  for (int v = 0; v < K::kGroup / kLoad; ++v) {
    const V loaded = reinterpret_cast<const V*>(from)[v];
#pragma unroll
    for (int e = 0; e < kLoad; ++e) values[v * kLoad + e] = to_float(loaded.element[e]);
  }
}

// What a block of the grid does with a piece: `rows` of a sequence from `row` on, of a tile of c.
template <class K>
class Walk {
  using T = typename K::T;
  static constexpr int kBytes = sizeof(T);
  static constexpr int kGroup = K::kGroup, kTileK = K::kTileK;

 public:
  __device__ Walk(const Plan& plan, const T* g, const uint32_t* nonzeros, const T* x, int c_tile,
                  int sequence, int row, int rows)
      : plan_(plan), shared_(K::shared(plan)), rows_(rows) {
    const int k_tile = sequence / plan.strips;
    const int k0 = k_tile * kTileK, c0 = c_tile * K::kTileC;
    const int q0 = sequence % plan.strips * plan.strip;
    const int width = plan.q - q0 < plan.strip ? plan.q - q0 : plan.strip;
    const int pixel = threadIdx.x % plan.strip;
    pixel_row_ = threadIdx.x / plan.strip;
    pixel_offset_ = pixel_row_ * plan.q + pixel;
    const int64_t first_pixel = int64_t(row) * plan.q + q0;
    k_tile_ = k_tile;
    mask_ = nonzeros + (first_pixel + pixel_offset_) * plan.words();
    has_pixel_ = pixel_row_ < plan.step_rows && pixel < width;
    // Of a group that only half exists, as with float32 it may, the other half is not to be read.
    g_ = g + first_pixel * plan.k + min(k0 + lane() % kValueChunks * K::kChunk, plan.k - K::kChunk);

    p_ = row % plan.p;
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
    const int64_t input_row =
        int64_t(row / plan.p) * plan.h + stage_row_ * plan.row_step - plan.pad_h;
    input_ = reinterpret_cast<const unsigned char*>(x) +
             ((input_row * plan.w + input_column) * plan.c + c) * kBytes;
  }

  // All of its steps, one barrier each; `memory` is where its sums go. While one is computed, the input and the values of the next are on
  // their way to shared memory, and the masks of the one after that to registers.
  __device__ __forceinline__ void run(float* memory) {
    __syncthreads();  // all are done with the piece before
    clear(0, shared_.bytes);
    __syncthreads();
    const int step = plan_.step_rows;
    stage(rows_, 0, load_mask(rows_));
    uint32_t mask = load_mask(rows_ - step);
    typename K::Sums sums = {};
    memory += warp() * K::kSums * 32 + lane() * K::kStore;
    bool first = true;
    int left = rows_, buffer = 0;
    do {  // once at least: sums are written even if there is no row
      cp_async_wait<0>();
      __syncthreads();
      stage(left - step, buffer ^ 1, mask);
      mask = load_mask(left - 2 * step);
      compute(left < step ? left : step, buffer, sums);
      if (longest() >= kChain || left <= step) {
        add_to(memory, sums, first);
        first = false;
      }
      left -= step;
      buffer ^= 1;
    } while (left > 0);
  }

 private:
  static constexpr int kValueChunks = kTileK / K::kChunk;  // 16 bytes each, of a pixel
  static constexpr int kInputChunks = K::kPixelBytes / 16;
  static constexpr int kInputColumns = kThreads / kInputChunks;  // copied in a pass
  static constexpr int kInputPasses =  // at most, of a row
      ((kMostStrip - 1) * K::kStride + K::kTaps + kInputColumns - 1) / kInputColumns;
  static_assert(kInputPasses <= 32, "a bit for each");

  static __device__ int warp() { return threadIdx.x / 32; }
  static __device__ int lane() { return threadIdx.x % 32; }

  // These bytes of shared memory.
  static __device__ void clear(unsigned begin, unsigned end) {
    for (unsigned at = begin + threadIdx.x * 16; at < end; at += kThreads * 16)
      *reinterpret_cast<Vector<uint32_t, 4>*>(dynamic_shared() + at) = {};
  }

  // The mask, of the tile's channels, of this thread's pixel in the next step, which has `left` rows or
  // plan_.step_rows, whichever is less; 0 where there is no such pixel.
  __device__ uint32_t load_mask(int left) {
    const bool there = has_pixel_ && pixel_row_ < left;
    const uint32_t mask =
        plan_.tile_bits(k_tile_, [&](int word) { return there ? mask_[word] : 0; });
    mask_ += plan_.step_rows * static_cast<int64_t>(plan_.q) * plan_.words();
    return mask;
  }

  // Starts the copies for the next step: the input rows that the step before did not see, and the
  // values. `mask` is that of this thread's pixel.
  __device__ __forceinline__ void stage(int left, int buffer, uint32_t mask) {
    if (left <= 0) return;
    stage_masks(buffer, mask);
    stage_values(buffer, mask);
#pragma unroll 1
    for (int rows = left < plan_.step_rows ? left : plan_.step_rows; rows > 0; --rows)
      stage_input();
    cp_async_commit();
  }

  __device__ __forceinline__ void stage_masks(int buffer, uint32_t mask) const {
    if (!has_pixel_) return;
    unsigned char* const to = dynamic_shared() + shared_.masks + buffer * shared_.mask_bytes +
                              pixel_offset_ + pixel_row_ * (kMostStrip - plan_.q);
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      to[w * (shared_.mask_bytes / kWarps)] =
          static_cast<unsigned char>(mask >> (kGroup * w) & ((1u << kGroup) - 1));
  }

  // A warp copies the values of its lanes' pixels, for all warps. A group that has no set bit is not
  // read.
  __device__ __forceinline__ void stage_values(int buffer, uint32_t mask) {
    unsigned char* const to =
        in_register(dynamic_shared() + shared_.values + buffer * shared_.value_bytes +
                    (threadIdx.x - lane()) * (kTileK * kBytes) + lane() * 16);
    const unsigned pixel_bytes = plan_.k * kBytes;
    // Of all groups that have part of what this lane copies: one, or two.
    constexpr int kCopied = kGroup < K::kChunk ? K::kChunk : kGroup;
    const uint32_t group = ((1u << kCopied) - 1)
                           << (lane() % kValueChunks * K::kChunk / kCopied * kCopied);
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
            cp_async16(to + pass * kThreads * 16,
                       input_ + static_cast<uint64_t>(pass_bytes_) * pass);
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
    const unsigned char* masks = in_register(shared + shared_.masks + buffer * shared_.mask_bytes +
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
  __device__ __forceinline__ void compute_row(const unsigned char* masks,
                                              const unsigned char* values, unsigned char* ring,
                                              typename K::Sums& sums) {
    typename K::Column columns[K::kColumns];
    float value[2][kGroup];
    const unsigned char own = masks[31 - lane()];
    const uint32_t pixels = __ballot_sync(~0u, own != 0);  // bit 31 - i: pixel i has a non-zero
    if (pixels == 0) return;
    // Each bit of a nibble into a byte.
#pragma unroll
    for (int i = 0; i < kGroup / 4; ++i)
      counts_[i] += (own >> 4 * i & 15) * 0x00204081 & 0x01010101;
    unsigned char* input[K::kTaps];
#pragma unroll
    for (int r = 0; r < K::kTaps; ++r)
      input[r] = in_register(ring + wrap(slot_ + r) * (plan_.columns * K::kPixelBytes));
    // Compilers do not know it, and make one instruction of an address instead of two.
    const int seen_bytes = plan_.pixel_bytes;
    int first = __clz(pixels) & -kRun;
    // All lanes have the same word. A reduction tells the compiler that they do, so that it branches
    // without caring for lanes that might go another way, as `pixels` being a vote does.
    uint32_t mask = __reduce_or_sync(~0u, *reinterpret_cast<const uint32_t*>(masks + first));
    bool ahead = false;  // the run before has loaded what the first pixel of this one needs
    for (bool more = true; more;) {
      const uint32_t after = pixels << first << kRun;  // bit 31: of the pixel after the run
      more = after != 0;
      const bool adjoins = after >> (32 - kRun) != 0;  // the next run is that of the next pixels
      const int next = first + kMostStrip - ((31 - __clz(after)) & -kRun);
      uint32_t next_mask = 0;
      if (more) next_mask = *reinterpret_cast<const uint32_t*>(masks + next);
      const unsigned char* const run_values = values + first * (kTileK * kBytes);
      const unsigned char* run_input[K::kTaps];
#pragma unroll
      for (int r = 0; r < K::kTaps; ++r) run_input[r] = in_register(input[r] + first * seen_bytes);
      if (!ahead) {
        load_values<K>(value[0], run_values);
#pragma unroll
        for (int s = 0; s < K::kTaps; ++s) load_column<K>(columns[s], run_input, s);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i + 1 < kRun || adjoins) {
          load_values<K>(value[(i + 1) % 2], run_values + (i + 1) * kTileK * kBytes);
#pragma unroll
          for (int s = 0; s < K::kStride; ++s) {
            const int index = i * K::kStride + K::kTaps + s;
            load_column<K>(columns[index % K::kColumns], run_input, index);
          }
        }
        if (i == 1) next_mask = __reduce_or_sync(~0u, next_mask);
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
      ahead = adjoins;
      first = next;
      mask = next_mask;
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
#pragma unroll
    for (uint32_t& count : counts_) count = 0;
  }

  // How many values of a channel, at most, were multiplied since sums were last added to memory.
  __device__ uint32_t longest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) {
      const uint32_t two = __reduce_add_sync(~0u, counts_[i / 2] >> i % 2 * 8 & 0x00ff00ff);
      most = max(most, max(two & 0xffff, two >> 16));
    }
    return most;
  }

  // Of this lane's pixel of all rows: values that were multiplied since sums were last added to memory,
  // a byte for each channel. It holds what kChain - 1 and a step of kThreads rows come to.
  uint32_t counts_[kGroup / 4] = {};
  static_assert(kChain - 1 + kThreads <= 255, "");
  const Plan& plan_;
  const typename K::Shared shared_;
  int rows_;  // of grad_output, that the block walks through
  int pixel_row_, pixel_offset_;  // of this thread's pixel in each step, from the first
  bool has_pixel_;
  int k_tile_;
  const uint32_t* mask_;  // where those of the next one are
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

}  // namespace
}  // namespace sparsebwd::cuda
