// SPDX-License-Identifier: Apache-2.0
// K2, AGB: the gradient of the input, from a gradient of the output most of which is zero.
//
// Idea. A warp owns a strip of neighbouring columns of grad_input times 32 * Lane channels, and
// sweeps down the rows of gradients. What a gradient g at (p, q, k) contributes lies in Taps x Taps
// pixels around it, so that sums of Taps rows of the strip are all it needs to hold, and it holds
// them in registers. For each row and each k that has a non-zero among the pixels that the strip
// sees, it loads the weights of that k, all taps of its channels, into registers, and adds them,
// times g, to the sums at places that are known when compiling: for each pixel there is its own
// code, that a branch passes by if g is zero. When a row of sums is complete it is stored, and the
// others move up.
//
// Long sums. When any pixel of the strip has given kChain values or more, the sums in registers are
// added to those that the warp has put aside in the workspace, row h at place h % Taps, and start from
// zero. Where a row has a part there, it is added when the row is complete.
//
// Masks and values. Lane j has the mask of pixel j, 32 k a word; a ballot turns it into a mask of
// pixels for each k. Values are loaded where the mask has a bit, lane = k, one register a pixel,
// and handed to all lanes by a shuffle. Weights, packed by a kernel of its own as float32 in the
// order in which lanes read them, come through the L1 cache: all warps of a multiprocessor are one
// block, have the same channels, and so read the same weights at about the same time; where the
// weights of a tile of channels are too many for the cache to forgive when they drift apart, they
// wait for each other at each row.
//
// Columns. Images are laid side by side, kPad columns apart, and cut into strips, so that no width
// leaves a strip half empty. What the gap receives is not stored; gradients there are none.
//
// Work. The rows of all strips, one strip after the other, are cut into equal runs, one for each
// warp of the device; a run that begins or ends within a strip needs rows of gradients around it
// too, of those only the taps that reach it. Where runs would be short, two or four warps share
// one: each has part of k, and complete rows are added up through shared memory, in a fixed order.
//
// Cost on sm_90 (counted in the machine code), 3x3, stride 1, d = density, for each k and strip, in
// issue slots: 306 d for products and shuffles, 18 + 12 where there is any non-zero, 6 for each
// three pixels that are not all zeros, 6.2 to fetch masks and values, .5 to 5 to put sums aside. And
// in clocks of the load-store unit, which four warps share: 18 for weights where there is any
// non-zero, 18 d for shuffles, 1.7 to fetch, .3 to 3 to put sums aside. Against a dense kernel that
// reaches 53 TFLOP/s on an H100 (80.6 clocks of a multiprocessor for the same) that PREDICTS, before
// latencies that three warps a scheduler do not hide:
//   density            .4    .3    .2    .1    .05   .01
//   slots / 4          47.8  38.8  29.3  18.4  11.5   4.0
//   load-store unit    29.9  27.2  24.8  19.9  14.2   5.0
//   speed-up, at most  1.7   2.1   2.8   4.0   5.7    16
// Not measured on a GPU. The cut leaves idle, or spends on rows twice and on gaps, 7 % of that
// (56x56, 64 channels, batch 256) to 29 % (7x7, 512 channels) on 132 multiprocessors.
#include <algorithm>

#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "plain.h"
#include "sparsebwd/integers.h"

namespace sparsebwd::cuda {
namespace {

constexpr int kWarps = 12;  // of a block, one on a multiprocessor: 168 registers a thread
constexpr int kThreads = 32 * kWarps;
constexpr int kPackThreads = 256;
constexpr int kWaveSteps = 24;  // a warp with twice as much leaves half of it to later blocks
constexpr int kMostWaves = 4;
constexpr int kFewSteps = 24;   // a warp with fewer shares them with another
constexpr int kGroup = 3;       // pixels of a strip that one branch passes by, if all are zeros
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
  // Rows of the filter that reach rows of grad_input that no later row of gradients reaches.
  static constexpr int kLast = std::min(Taps, Stride);
  static constexpr int kRows = std::max(Taps, Stride);
  static constexpr int kChannels = 32 * Lane;
  static constexpr int kWeights = Lane * Taps * Taps;  // of a lane, for one k
  static constexpr int kPack = 32 * kWeights;
  static constexpr int kRowFloats = Columns * kChannels;  // sums of a row of a strip
  static constexpr int kAside = kTaps * kRowFloats;  // that a warp puts aside
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
  int words;         // of the mask of a pixel
  int image_columns; // from the first column of an image to that of the next, gap included
  int image_pixels;  // the same in columns of grad_output
  int strip_steps;   // gradient rows that complete all rows of a strip
  int64_t steps;     // of all strips
  int warp_steps;    // of a warp, at most
  int sharers;       // warps that have the same rows, each every sharers-th word of k
  int tile_blocks;   // blocks for a tile of channels
  bool together;     // warps of a block wait for each other at each row
};

// Weights are packed as float32 [tile of channels][k][...]: the kWeights of each lane, tap by tap,
// four at a time and the last two together, so that a warp loads whole lines.
template <class F>
__global__ void __launch_bounds__(kPackThreads)
pack_kernel(Plan plan, const typename F::T* weight, Strides strides, float* packed, int64_t count) {
  constexpr int kFours = F::kWeights / 4;
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= count) return;
  const int place = static_cast<int>(index % F::kPack);
  const int rest = place - kFours * 128;
  const int lane = rest < 0 ? place / 4 % 32 : rest / 2;
  const int which = rest < 0 ? place / 128 * 4 + place % 4 : kFours * 4 + rest % 2;
  const int64_t row = index / F::kPack, k = row % plan.k, tile = row / plan.k;
  const int64_t c = tile * F::kChannels + which % F::kLane * 32 + lane;
  const int tap = which / F::kLane, r = tap / F::kTaps, s = tap % F::kTaps;
  packed[index] = c < plan.c ? to_float(weight[k * strides.n + c * strides.c + r * strides.h +
                                              s * strides.w])
                             : 0.0f;
}

// What lane `lane` has of row `row` of the packed weights.
template <class F>
__device__ __forceinline__ void load_weights(float (&weights)[F::kWeights], const float* packed,
                                             uint32_t row, int lane) {
  constexpr int kFours = F::kWeights / 4;
  const char* of_lane = reinterpret_cast<const char*>(packed + 4 * lane) +
                        uint64_t(row) * uint32_t(F::kPack * sizeof(float));
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    const float4 four = reinterpret_cast<const float4*>(of_lane)[32 * i];
    weights[4 * i] = four.x, weights[4 * i + 1] = four.y;
    weights[4 * i + 2] = four.z, weights[4 * i + 3] = four.w;
  }
  if constexpr (F::kWeights % 4 != 0) {
    const float2 two = *(reinterpret_cast<const float2*>(of_lane) - lane + 64 * kFours);
    weights[4 * kFours] = two.x, weights[4 * kFours + 1] = two.y;
  }
}

// Adds g, pixel j of the strip, times rows First .. Last - 1 of the filter.
template <class F, int First, int Last>
__device__ __forceinline__ void add_product(typename F::Sums& sums,
                                            const float (&weights)[F::kWeights], float g, int j) {
#pragma unroll
  for (int r = First; r < Last; ++r) {
#pragma unroll
    for (int s = 0; s < F::kTaps; ++s) {
      const int column = F::kStride * j - F::kOffset + s;
      if (column < 0 || column >= F::kColumns) continue;
#pragma unroll
      for (int i = 0; i < F::kLane; ++i) {
        float& sum = sums[r][column][i];
        sum = fmaf(g, weights[(r * F::kTaps + s) * F::kLane + i], sum);
      }
    }
  }
}

// Adds to `sums` what a row of gradients gives through rows First .. Last - 1 of the filter, of the
// words of k that are this warp's, from `word` on, until sums are long. `pixel`: index of the gradient
// pixel of this lane in row 0, or -1. `p`: the row. `values`: of a pixel, at most, that were multiplied
// since sums were put aside. Returns the next word.
template <class F, int First, int Last>
__device__ __forceinline__ int add_row(typename F::Sums& sums, const Plan& plan,
                                       const typename F::T* __restrict__ grad_output,
                                       const uint32_t* __restrict__ nonzeros,
                                       const float* __restrict__ packed, int word, int pixel,
                                       int p, int& values) {
  using T = typename F::T;
  const int lane = threadIdx.x % 32;
  const int here = pixel + p * plan.q;
  const auto load = [&](int word) -> uint32_t {
    return pixel < 0 || word >= plan.words ? 0 : nonzeros[int64_t(here) * plan.words + word];
  };
  uint32_t next = load(word);
  for (; word < plan.words && values < kChain; word += plan.sharers) {
    const uint32_t bits = next;  // lane = pixel, bit = k
    next = load(word + plan.sharers);
    const char* first = reinterpret_cast<const char*>(grad_output + word * 32 + lane);
    float value[F::kPixels];  // lane = k
#pragma unroll
    for (int j = 0; j < F::kPixels; ++j) {
      const uint32_t of_pixel = __shfl_sync(kAll, bits, j);
      const uint32_t from = __shfl_sync(kAll, here, j);
      value[j] = 0;
      if (of_pixel >> lane & 1)
        value[j] = to_float(*reinterpret_cast<const T*>(first + uint64_t(from) * plan.pixel_bytes));
    }
    values += __reduce_max_sync(kAll, __popc(bits));
    uint32_t left = __reduce_or_sync(kAll, bits);
    while (left != 0) {
      const uint32_t bit = left & -left;
      const int k = 31 - __clz(bit);
      left ^= bit;
      const uint32_t pixels = __ballot_sync(kAll, (bits & bit) != 0);
      float weights[F::kWeights];
      load_weights<F>(weights, packed, word * 32 + k, lane);
#pragma unroll
      for (int group = 0; group < F::kPixels; group += kGroup) {
        if ((pixels >> group & ((1u << kGroup) - 1)) == 0) continue;
#pragma unroll
        for (int j = group; j < group + kGroup && j < F::kPixels; ++j) {
          if (pixels >> j & 1) {
            add_product<F, First, Last>(sums, weights, __shfl_sync(kAll, value[j], k), j);
          }
        }
      }
    }
  }
  return word;
}

// Whether a column receives anything.
template <class F>
constexpr bool receives(int column) {
  return F::kTaps >= F::kStride || column % F::kStride == 0;
}

// Adds a row of sums and, if there is Any, that which the warp has put aside. The total goes Back to
// the registers, or is put aside while they start from zero.
template <class F, bool Any, bool Back>
__device__ __forceinline__ void exchange(float (&sums)[F::kColumns][F::kLane], float* aside) {
  auto* const at = reinterpret_cast<typename F::Store*>(aside) + threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < F::kColumns; ++column) {
    if (!receives<F>(column)) continue;
#pragma unroll
    for (int i = 0; i < F::kLane; i += F::kStore) {
      typename F::Store& stored = at[(column * F::kLane + i) / F::kStore * 32];
      typename F::Store sum;
#pragma unroll
      for (int e = 0; e < F::kStore; ++e) sum.sum[e] = sums[column][i + e];
      if (Any) {
        const typename F::Store old = stored;
#pragma unroll
        for (int e = 0; e < F::kStore; ++e) sum.sum[e] += old.sum[e];
      }
#pragma unroll
      for (int e = 0; e < F::kStore; ++e) sums[column][i + e] = Back ? sum.sum[e] : 0.0f;
      if (!Back) stored = sum;
    }
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads, 1)
agb_kernel(Plan plan, const typename F::T* __restrict__ grad_output,
           const uint32_t* __restrict__ nonzeros, const float* __restrict__ packed, float* aside,
           typename F::T* __restrict__ result) {
  const int lane = threadIdx.x % 32;
  const int tile = blockIdx.x / plan.tile_blocks;
  packed += int64_t(tile) * plan.k * F::kPack;
  // The shuffle tells the compiler that whole warps branch alike.
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0);
  const int share = warp % plan.sharers, sharing = warp / plan.sharers;
  const int block_parts = kWarps / plan.sharers;
  const int64_t part = int64_t(blockIdx.x % plan.tile_blocks) * block_parts + sharing;
  const int64_t parts = int64_t(plan.tile_blocks) * block_parts;
  const int64_t first_step = plan.steps * part / parts;
  int left = static_cast<int>(plan.steps * (part + 1) / parts - first_step);
  int strip = static_cast<int>(first_step / plan.strip_steps);
  int first_p = static_cast<int>(first_step % plan.strip_steps);

  typename F::Sums sums;
  int values = 0;     // of a pixel, at most, that were multiplied since sums were put aside
  uint32_t kept = 0;  // a bit for each row of sums: part of it is put aside
  int p = 0, last_p = 0;    // row of gradients; those from first_p to last_p - 1 complete rows
  int pixel = -1, to = -1;  // lane = gradient pixel, lane = column: in row 0, or -1
  for (int turn = plan.warp_steps + F::kLead; turn > 0; --turn) {
    if (plan.together) __syncthreads();
    if (left == 0) continue;
    if (p == last_p) {  // a new strip
      last_p = min(plan.strip_steps, first_p + left);
      p = max(first_p - F::kLead, 0);
      const int column = strip * F::kColumns + lane;
      int n = column / plan.image_columns, at = column - n * plan.image_columns;
      to = lane < F::kColumns && n < plan.n && at < plan.w ? n * plan.h * plan.w + at : -1;
      const int seen = strip * (F::kColumns / F::kStride) + lane - F::kBefore;
      n = seen < 0 ? 0 : seen / plan.image_pixels, at = seen - n * plan.image_pixels;
      const bool inside = lane < F::kPixels && at >= 0 && n < plan.n && at < plan.q;
      pixel = inside ? n * plan.p * plan.q + at : -1;
      values = 0, kept = 0;
#pragma unroll
      for (auto& row : sums)
#pragma unroll
        for (auto& column_sums : row)
#pragma unroll
          for (float& sum : column_sums) sum = 0;
    }

    // Computed anew each time: there is no register to keep it in.
    const auto place = [&](int r) {
      const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / 32;
      return aside + uint64_t(warp) * F::kAside + (p * F::kStride + r) % F::kTaps * F::kRowFloats;
    };
    if (p < plan.p) {
      for (int word = share; word < plan.words;) {
        if (F::kLead > 0 && p == first_p - F::kLead) {
          constexpr int kFirst = F::kLead * F::kStride;
          word = add_row<F, kFirst, F::kTaps>(sums, plan, grad_output, nonzeros, packed, word, pixel, p, values);
        } else if (F::kLead > 0 && p == last_p - 1) {
          word = add_row<F, 0, F::kLast>(sums, plan, grad_output, nonzeros, packed, word, pixel, p, values);
        } else {
          word = add_row<F, 0, F::kTaps>(sums, plan, grad_output, nonzeros, packed, word, pixel, p, values);
        }
        if (values < kChain) continue;
#pragma unroll
        for (int r = 0; r < F::kTaps; ++r)
          if (kept >> r & 1) exchange<F, true, false>(sums[r], place(r));
          else exchange<F, false, false>(sums[r], place(r));
        kept = (1u << F::kTaps) - 1;
        values = 0;
      }
    }

    // The first kStride rows of sums are complete; the others move up.
    if (p >= first_p) {
#pragma unroll
      for (int r = 0; r < F::kStride; ++r) {
        const int h = p * F::kStride - F::kPad + r;
        if (h < 0 || h >= plan.h) continue;
        if (kept >> r & 1) exchange<F, true, true>(sums[r], place(r));
        const auto store = [&](int column, const float (&sum)[F::kLane]) {
          // With stride 1 both images have the same size, and a column its gradient pixel's place.
          const int of_column = F::kStride == 1 ? __shfl_sync(kAll, pixel, column + F::kBefore)
                                                : __shfl_sync(kAll, to, column);
          if (of_column < 0) return;
          const int64_t at = int64_t(of_column + h * plan.w) * plan.c;
#pragma unroll
          for (int i = 0; i < F::kLane; ++i) {
            const int c = tile * F::kChannels + i * 32 + lane;
            if (c < plan.c) result[at + c] = from_float<typename F::T>(sum[i]);
          }
        };
        if (F::kLead == 0 || plan.sharers == 1) {
#pragma unroll
          for (int column = 0; column < F::kColumns; ++column) store(column, sums[r][column]);
        } else {
          float* rows = reinterpret_cast<float*>(dynamic_shared()) +
                        sharing * plan.sharers * F::kRowFloats + lane;
#pragma unroll
          for (int column = 0; column < F::kColumns; ++column)
#pragma unroll
            for (int i = 0; i < F::kLane; ++i)
              rows[share * F::kRowFloats + (column * F::kLane + i) * 32] = sums[r][column][i];
          named_barrier(1 + sharing, 32 * plan.sharers);
          for (int column = share; column < F::kColumns; column += plan.sharers) {
            float sum[F::kLane] = {};
            for (int other = 0; other < plan.sharers; ++other)
#pragma unroll
              for (int i = 0; i < F::kLane; ++i)
                sum[i] += rows[other * F::kRowFloats + (column * F::kLane + i) * 32];
            store(column, sum);
          }
          named_barrier(1 + sharing, 32 * plan.sharers);  // before the next row overwrites this one
        }
      }
      --left;
    }
#pragma unroll
    for (int r = 0; r < F::kRows; ++r)
#pragma unroll
      for (int column = 0; column < F::kColumns; ++column)
#pragma unroll
        for (int i = 0; i < F::kLane; ++i)
          sums[r][column][i] = r + F::kStride < F::kRows
                                   ? sums[(r + F::kStride) % F::kRows][column][i]
                                   : 0.0f;
    kept >>= F::kStride;
    if (++p == last_p) ++strip, first_p = 0;
  }
}

// Calls f(Form()) with the form for this problem.
template <class T, class F>
auto with_form(const ConvProblem& problem, F&& f) {
  const bool strided = problem.stride_w == 2;
  if (problem.r == 3) {
    return strided ? f(Form<T, 3, 2, 16, 2>()) : f(Form<T, 3, 1, 16, 2>());
  }
  if (problem.c <= 64) return strided ? f(Form<T, 1, 2, 32, 2>()) : f(Form<T, 1, 1, 32, 2>());
  return strided ? f(Form<T, 1, 2, 24, 8>()) : f(Form<T, 1, 1, 12, 8>());
}

template <class F>
int64_t packed_floats(const ConvProblem& problem) {
  return ceil_div(problem.c, F::kChannels) * problem.k * F::kPack;
}

template <class F>
int64_t blocks(const Plan& plan) {
  return ceil_div(plan.c, F::kChannels) * plan.tile_blocks;
}

template <class F>
Plan make_plan(const ConvProblem& problem, const Device& device) {
  Plan plan = {};
  plan.n = static_cast<int>(problem.n), plan.c = static_cast<int>(problem.c);
  plan.h = static_cast<int>(problem.h), plan.w = static_cast<int>(problem.w);
  plan.k = static_cast<int>(problem.k);
  plan.p = static_cast<int>(problem.p()), plan.q = static_cast<int>(problem.q());
  plan.pixel_bytes = static_cast<uint32_t>(problem.k * sizeof(typename F::T));
  plan.words = static_cast<int>(ceil_div(plan.k, 32));
  plan.image_pixels = static_cast<int>(ceil_div(plan.w + F::kPad, F::kStride));
  plan.image_columns = plan.image_pixels * F::kStride;
  plan.strip_steps = static_cast<int>(ceil_div(plan.h + F::kPad, F::kStride));
  if (problem.n == 0) return plan;
  const int64_t columns = int64_t(plan.n - 1) * plan.image_columns + plan.w;
  plan.steps = ceil_div(columns, F::kColumns) * plan.strip_steps;
  // Whole waves of blocks; each warp has the same number of steps, but for one.
  const int64_t tiles = ceil_div(plan.c, F::kChannels), processors = device.multiprocessors;
  const auto tile_blocks = [&](int64_t waves) {
    return std::max<int64_t>(processors * waves / tiles, 1);
  };
  const int64_t wanted = ceil_div(plan.steps, tile_blocks(1) * kWarps) / kWaveSteps;
  const int64_t waves = std::clamp<int64_t>(wanted, 1, kMostWaves);
  // Runs of few rows see many rows around them. Warps that share a run have it longer, but do not
  // read the same weights at the same time.
  const int64_t steps = plan.steps / (tile_blocks(waves) * kWarps);
  plan.sharers = F::kLead == 0 || steps >= kFewSteps ? 1 : steps > 1 ? 2 : 4;
  while (plan.sharers > 1 && plan.words % plan.sharers != 0 && plan.words < 4 * plan.sharers)
    plan.sharers /= 2;
  const int block_parts = kWarps / plan.sharers;
  plan.tile_blocks =
      static_cast<int>(std::min(tile_blocks(waves), ceil_div(plan.steps, block_parts)));
  plan.warp_steps = static_cast<int>(ceil_div(plan.steps, int64_t(plan.tile_blocks) * block_parts));
  const int64_t bytes = int64_t(plan.k) * F::kPack * 4;
  plan.together = bytes > 2 * int64_t(device.shared_per_multiprocessor);
  return plan;
}

template <class F>
cudaError_t run(const ConvCall& call, const Device& device, cudaStream_t stream) {
  using T = typename F::T;
  const Plan plan = make_plan<F>(call.problem, device);
  const int64_t count = packed_floats<F>(call.problem);
  float* packed = static_cast<float*>(call.workspace);
  const LaunchShape packing = {static_cast<unsigned>(ceil_div(count, kPackThreads)), kPackThreads};
  const cudaError_t error = launch(pack_kernel<F>, packing, stream, plan,
                                   static_cast<const T*>(call.operand), call.operand_strides,
                                   packed, count);
  if (error != cudaSuccess) return error;
  const size_t shared = plan.sharers > 1 ? kWarps * F::kRowFloats * sizeof(float) : 0;
  LaunchShape shape = {static_cast<unsigned>(blocks<F>(plan)), kThreads, shared};
  shape.prefers = Prefers::kCache;  // for the weights
  return launch(agb_kernel<F>, shape, stream, plan, static_cast<const T*>(call.grad_output),
                call.nonzeros, packed, packed + count, static_cast<T*>(call.result));
}

bool is_sparse(const ConvCall& call) {
  const ConvProblem& p = call.problem;
  return call.nonzeros != nullptr && agb_refusal(p, call.dtype) == nullptr &&
         is_channels_last(call.grad_output_strides, p.n, p.k, p.p(), p.q()) &&
         is_channels_last(call.result_strides, p.n, p.c, p.h, p.w);
}

}  // namespace

const char* agb_refusal(const ConvProblem& problem, DType) {
  if (problem.groups != 1) return "the sparse kernel takes no groups";
  if (problem.r != problem.s || (problem.r != 1 && problem.r != 3))
    return "the sparse kernel takes filters of 3x3 and 1x1 only";
  if (problem.r > 1 && (problem.dil_h != 1 || problem.dil_w != 1))
    return "the sparse kernel takes no dilation";
  if (problem.stride_h != problem.stride_w || problem.stride_h > 2)
    return "the sparse kernel takes strides of 1 and 2 only, the same in both directions";
  if (problem.pad_h != problem.r / 2 || problem.pad_w != problem.r / 2)
    return "the sparse kernel takes a padding of 1 for 3x3 and of 0 for 1x1 only";
  // Pixels, columns with their gaps, and bytes of a pixel are counted in 32 bits.
  if (static_cast<double>(problem.n) * (problem.h + 2.0) * (problem.w + 2.0) > INT32_MAX ||
      problem.c > INT32_MAX / 8 || problem.k > INT32_MAX / 8)
    return "the sparse kernel takes fewer than 2^31 pixels and 2^28 channels";
  return nullptr;
}

size_t agb_workspace(const ConvCall& call, const Device& device) {
  if (!is_sparse(call)) return 0;
  return with_form<float>(call.problem, [&](auto form) {
    using F = decltype(form);
    const int64_t aside = blocks<F>(make_plan<F>(call.problem, device)) * kWarps * F::kAside;
    return static_cast<size_t>(packed_floats<F>(call.problem) + aside) * sizeof(float);
  });
}

cudaError_t agb(const ConvCall& call, const Device& device, cudaStream_t stream) {
  if (!is_sparse(call)) return agb_plain(call, stream);
  return with_element(call.dtype, [&](auto element) {
    return with_form<typename decltype(element)::type>(call.problem, [&](auto form) {
      return run<decltype(form)>(call, device, stream);
    });
  });
}

}  // namespace sparsebwd::cuda
