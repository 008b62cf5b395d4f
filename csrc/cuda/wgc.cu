// SPDX-License-Identifier: Apache-2.0
// WGC: dw[k][r][s][c] = sum over pixels of g[pixel][k] * x[pixel * stride + (r, s) - pad][c], in
// float32, by multiplying for the non-zeros of g only.
//
// As loops, outermost first:
//   parts of equal cost of all rows n, p, of all strips of q   block; for a tile of c
//   and tiles of k
//     pieces: rows of one strip and one tile of k              block; some k each warp, sums stay in registers
//       steps of a few rows, double-buffered                   staged in shared memory by cp.async
//         rows n, p of a step, then pixels q                   the window of x that a pixel sees: registers
//           channels k of the warp                             unrolled: a branch passes by those of which g is zero
//             taps r, s and channels c                         unrolled: multiply-adds; lanes span c
//
// Who does what. A warp owns some output channels k, all taps and some input channels c for each lane,
// 144 sums in registers (1x1: 64). A block is four warps. Tiles of a block are
//   3x3   16 k and 128 c, four for each lane: a branch passes by 36 multiply-adds
//   3x3   32 k and 64 c, two for each lane, where c is few, or with a stride, which sees more columns
//   1x1   32 k and 256 c, eight for each lane
// 32 or 16 k are a word of the mask of a pixel, or half of one. A block walks along `strip` pixels of a
// row of grad_output, then the same columns of the next row, through a piece of rows that may span
// images, and on to the next strip or tile of k until its part is done. Blocks of one part, for all
// tiles of c, lie next to each other in the grid: they read the same gradient at the same time.
//
// How. The value of g is the same for all lanes, the input differs. For each pixel of a run of four, a
// warp holds the window of the input that the pixel sees in registers; all but the newest columns are
// there already, unless the run before was passed over, and columns take registers in turn (kColumns),
// so that none is moved. Then for each of the pixel's bits of the mask: branch around taps x taps x lane
// multiply-adds if it is 0. The branches are real and uniform: see compute_row. No branch asks whether
// a pixel is empty, as it would wait for the answer; runs, and rows, without a non-zero are passed over.
//
// Input, values and masks come through shared memory. Rows of the input lie in a ring and are read
// once for each block; while a step of a few rows is computed, the next one is fetched, with one
// barrier a step. Values are fetched by groups of a few channels, those without a non-zero never.
//
// Sums. When a warp has multiplied kChain values of any channel, it adds its registers to its own
// sums in the workspace. wgc_reduce adds those of all pieces in double precision. Nothing depends on
// the order in which threads run.
//
// Load balance. Warps of a block may differ in density; two blocks share a multiprocessor, therefore:
// while one waits at a barrier the other computes. Images and tiles of k differ too: count_kernel counts
// what each row costs in each of them, and cut_kernel cuts all of these rows, one tile after the other,
// into parts of equal cost. So a tile of k has as many blocks as its non-zeros need, not a whole number.
//
// Cost: `make sass` predicts it from the machine code; docs/gpu.md has the figures. Not measured on a GPU.
#include <algorithm>

#include "cut.cuh"
#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "plain.h"
#include "sparsebwd/integers.h"
#include "wgc_count.cuh"
#include "wgc_form.cuh"
#include "wgc_reduce.cuh"
#include "wgc_walk.cuh"

namespace sparsebwd::cuda {
namespace {

// partials: kBlockSums for each piece and tile of c.
template <class K>
__global__ void __launch_bounds__(kThreads, kBlocks)
    wgc_kernel(const Plan plan, const typename K::T* g, const uint32_t* nonzeros,
               const typename K::T* x, const int32_t* cuts, float* partials) {
  const int c_tile = blockIdx.x % plan.c_tiles, part = blockIdx.x / plan.c_tiles;
  const int begin = cuts[part], end = cuts[part + 1];
  int sequence = min(begin / plan.rows, plan.sequences() - 1);
  int row = begin - sequence * plan.rows;
  do {
    const int rows = min(end - sequence * plan.rows, plan.rows) - row;
    Walk<K>(plan, g, nonzeros, x, c_tile, sequence, row, rows)
        .run(partials + (plan.piece(part, sequence) * plan.c_tiles + c_tile) * K::kBlockSums);
    row = 0;
  } while (++sequence < plan.sequences() && sequence * plan.rows <= end);
}

// Fills as many waves of blocks as is best by this model, in units of the time for a pixel: writing
// and adding up its sums costs a part 256, and parts, although cut by what they cost, may differ so
// much that the last ones make the rest of the device wait for an eighth of a part.
int64_t choose_parts(int64_t steps, int64_t strip, int64_t c_tiles, int64_t slots) {
  int64_t best = 1;
  double best_cost = 0;
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t parts = std::max<int64_t>(1, std::min(steps, waves * slots / c_tiles));
    const double length = static_cast<double>(ceil_div(steps, parts) * strip);
    const double cost =
        static_cast<double>(ceil_div(parts * c_tiles, slots)) * (length + 256) + length / 8;
    if (waves == 1 || cost < best_cost) {
      best = parts;
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
  plan.rows = static_cast<int>(problem.n * plan.p);
  plan.c_tiles = static_cast<int>(ceil_div(plan.c, K::kTileC));
  plan.k_tiles = static_cast<int>(ceil_div(plan.k, K::kTileK));
  plan.tile_k = K::kTileK;
  plan.pixel_bytes = K::kStride * K::kPixelBytes;

  const int most =
      std::min(device.shared_per_block, device.shared_per_multiprocessor / kBlocks - 1024);
  const auto fits = [&](int step_rows) {
    plan.step_rows = step_rows;
    // What two steps see: their rows, and the halo of each image that they meet.
    const int64_t images = ceil_div(2 * step_rows - 1, plan.p) + 1;
    plan.ring_rows =
        static_cast<int>((2 * step_rows - images) * plan.stage_stride + images * K::kTaps);
    return K::shared(plan).bytes <= static_cast<size_t>(most);
  };
  // Strips are as long, and steps as many rows, as shared memory is best used for: a step takes a warp some 300 clocks
  // beside its pixels, and a row of a strip 100.
  int best_strip = kRun, best_rows = 1;
  double best_cost = 0;
  for (int64_t strips = std::max<int64_t>(ceil_div(plan.q, kMostStrip), 1);; ++strips) {
    plan.strip = static_cast<int>(ceil_div(ceil_div(plan.q, strips), kRun) * kRun);
    plan.columns = (plan.strip - 1) * K::kStride + K::kTaps;
    int rows = kThreads / plan.strip;
    while (rows > 1 && !fits(rows)) --rows;
    const double cost = 300.0 / (rows * plan.strip) + 100.0 / plan.strip;
    if (fits(rows) && (best_cost == 0 || cost < best_cost))
      best_strip = plan.strip, best_rows = rows, best_cost = cost;
    if (plan.strip <= kRun) break;
  }
  plan.strip = best_strip;
  plan.columns = (plan.strip - 1) * K::kStride + K::kTaps;
  plan.strips = static_cast<int>(ceil_div(plan.q, plan.strip));
  fits(best_rows);

  plan.parts = static_cast<int>(choose_parts(plan.steps(), plan.strip, plan.c_tiles,
                                             int64_t(device.multiprocessors) * kBlocks));
  return plan;
}

// The workspace: these sums, then a word for the cost of each step, then cuts.
template <class K>
int64_t sums(const Plan& plan) {
  return plan.pieces() * plan.c_tiles * K::kBlockSums;
}
int64_t cuts(const Plan& plan) { return int64_t(plan.parts) + 1; }

// Calls f(K()) for the kernel that runs the problem.
template <class F>
auto with_kernel(const ConvProblem& problem, DType dtype, const Device& device, F&& f) {
  return with_element(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (problem.r == 1) return f(Kernel<T, 1, 1, 8>());
    if (problem.stride_w == 2) return f(Kernel<T, 3, 2, 2>());
    // With 4 channels of a lane a branch passes by twice as many products; unless too many lanes have no channels, or shared
    // memory is too small for such tiles. (With a stride, their columns take more registers than there are.)
    const bool wide = ceil_div(problem.c, 128) * 8 <= ceil_div(problem.c, 64) * 5 &&
                      device.shared_per_multiprocessor >= 160 * 1024;
    return wide ? f(Kernel<T, 3, 1, 4>()) : f(Kernel<T, 3, 1, 2>());
  });
}

bool is_sparse(const ConvCall& call) { return call.nonzeros != nullptr && wgc_suits(call); }

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
  const int64_t sequences = ceil_div(problem.k, 16) * ceil_div(problem.q(), kRun);
  if (sequences * ceil_div(problem.c, pointwise ? 256 : 64) > 1 << 21)
    return "rows are too long for so many channels";
  if (problem.n * problem.p() > INT32_MAX / std::max<int64_t>(sequences, 1))
    return "grad_output has too many rows for so many channels";
  return nullptr;
}

size_t wgc_workspace(const ConvCall& call, const Device& device) {
  if (!is_sparse(call)) return 0;
  return with_kernel(call.problem, call.dtype, device, [&](auto kernel) {
    using K = decltype(kernel);
    const Plan plan = make_plan<K>(call.problem, device);
    return (sums<K>(plan) + plan.steps() + cuts(plan)) * sizeof(float);
  });
}

cudaError_t wgc(const ConvCall& call, const Device& device, cudaStream_t stream) {
  if (!is_sparse(call)) return wgc_plain(call, stream);
  return with_kernel(call.problem, call.dtype, device, [&](auto kernel) {
    using K = decltype(kernel);
    using T = typename K::T;
    const Plan plan = make_plan<K>(call.problem, device);
    float* const partials = static_cast<float*>(call.workspace);
    int32_t* const costs_at = reinterpret_cast<int32_t*>(partials + sums<K>(plan));
    int32_t* const cuts_at = costs_at + plan.steps();
    const auto counting = static_cast<unsigned>(ceil_div(plan.steps(), kRowsOfBlock));
    cudaError_t error = launch(count_kernel, LaunchShape{dim3(counting), dim3(kCountThreads)},
                               stream, plan, call.nonzeros, costs_at);
    if (error != cudaSuccess) return error;
    error = launch(cut_kernel, LaunchShape{dim3(1), dim3(kCutThreads), kCutShared}, stream,
                   costs_at, plan.steps(), plan.parts, cuts_at);
    if (error != cudaSuccess) return error;
    LaunchShape shape = {};
    shape.grid = dim3(static_cast<unsigned>(int64_t(plan.parts) * plan.c_tiles));
    shape.block = dim3(kThreads);
    shape.shared = K::shared(plan).bytes;
    shape.prefers =
        Prefers::kShared;  // for kBlocks; what goes through the L1 cache is not read again
    error = launch(wgc_kernel<K>, shape, stream, plan, static_cast<const T*>(call.grad_output),
                   call.nonzeros, static_cast<const T*>(call.operand), cuts_at, partials);
    if (error != cudaSuccess) return error;
    const int slices = plan.pieces() / plan.k_tiles < 32 ? 1 : 8;
    const int64_t tiles = int64_t(plan.c_tiles) * plan.k_tiles;
    LaunchShape reduction = {};
    reduction.grid = dim3(static_cast<unsigned>(tiles * K::kBlockSums / (kReduceThreads / slices)));
    reduction.block = dim3(kReduceThreads);
    reduction.shared = kReduceThreads * sizeof(double);
    return launch(wgc_reduce<K>, reduction, stream, plan, slices, cuts_at, partials,
                  static_cast<T*>(call.result), call.result_strides);
  });
}

}  // namespace sparsebwd::cuda
