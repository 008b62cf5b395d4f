// SPDX-License-Identifier: Apache-2.0
// K2, AGB: dx[n][h][w][c] = sum over k, r, s of g[n][p][q][k] * weight[k][c][r][s], where p * stride + r - pad = h and
// so on, by multiplying for the non-zeros of g only.
//
// As loops, outermost first:
//   tiles of 32 * Lane channels c, a multiprocessor each       block
//     ranges of rows, of equal cost                            warp (or two or four warps, each with part of k)
//       strips of Columns columns w, then rows p of g          sums of Taps rows of the strip stay in registers
//         words of 32 channels k                               one mask a pixel, values staged in shared memory
//           channels k with a non-zero among the pixels        weights of k: registers, read by vectors through L1
//             pixels q of the strip                            unrolled: a branch passes by those of which g is zero
//               taps r, s and channels c                       unrolled: multiply-adds; lanes span c
//
// Values. Lane j has the mask of pixel j, 32 k a word; a ballot turns it into a mask of pixels for each k. Lanes = k load
// the values that are not zero, all pixels of the strip, and stage them in shared memory, from where a row of them, those
// of one k, comes to all lanes by a few loads of 16 bytes: each is a broadcast.
//
// Weights are packed first (agb_prepare.cuh), as float32 in the order in which lanes read them. All warps of a block have
// the same channels, so that the L1 cache serves them; where a tile has too many weights for it to forgive warps that drift
// apart, they wait for each other at each row.
//
// Long sums. When any pixel of the strip has given kChain values or more, the sums in registers are added to those that the
// warp has put aside in the workspace, row h at place h % Taps, and start from zero. Where a row has a part there, it is
// added when the row is complete.
//
// Columns. Images are laid side by side, kPad columns apart, and cut into strips, so that no width leaves a strip half
// empty. What the gap receives is not stored; gradients there are none.
//
// Schedule. A step is a row of a strip. Steps, one strip after the other, are cut into ranges of equal cost, one for each
// warp (or group of warps that share k) of the device: prepare_kernel counts the non-zeros of each step, cut_kernel finds
// the cuts, and nobody waits for the host. A range that begins within a strip reads kLead rows before it too, and drops
// what they give to rows of others. Results depend on the data, the problem and the device only.
//
// Cost: `make sass` predicts it from the machine code; docs/gpu.md has the figures. Not measured on a GPU.
#include <algorithm>

#include "agb_epilogue.cuh"
#include "agb_form.cuh"
#include "agb_prepare.cuh"
#include "agb_row.cuh"
#include "cut.cuh"
#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "plain.h"
#include "sparsebwd/integers.h"

namespace sparsebwd::cuda {
namespace {

template <class F>
__global__ void __launch_bounds__(kThreads, 1)
    agb_kernel(Plan plan, const typename F::T* __restrict__ grad_output,
               const uint32_t* __restrict__ nonzeros, const float* __restrict__ packed,
               const int32_t* __restrict__ cuts, float* aside, typename F::T* __restrict__ result) {
  const int lane = threadIdx.x % 32;
  const int tile = blockIdx.x / plan.tile_blocks;
  packed += int64_t(tile) * plan.k * F::kPack + F::kVector * lane;
  // The shuffle tells the compiler that whole warps branch alike.
  const int warp = __shfl_sync(kAll, threadIdx.x / 32, 0);
  float* const shared = reinterpret_cast<float*>(
      in_register(dynamic_shared() + warp * plan.shared_floats * sizeof(float)));
  const int share = warp % plan.sharers, sharing = warp / plan.sharers;
  const int block_parts = kWarps / plan.sharers;
  const int part = blockIdx.x % plan.tile_blocks * block_parts + sharing;
  // The step to complete next, and the one after the last: the same for all lanes, says the shuffle.
  int step = __shfl_sync(kAll, cuts[part], 0);
  const int end = __shfl_sync(kAll, cuts[part + 1], 0);

  typename F::Sums sums;
  int values = 0;  // of a pixel, at most, that were multiplied since sums were put aside
  uint32_t kept = 0;  // a bit for each row of sums: part of it is put aside
  int p = plan.strip_steps;  // row of gradients
  int lead = 0;  // how many rows of them come before the one that completes `step`
  int here = -1,
      to = -1;  // lane = gradient pixel in this row, lane = column in row 0; below 0: none
  while (plan.together ? __syncthreads_or(step < end) : step < end) {
    if (step >= end) continue;
    if (p == plan.strip_steps) {  // a new strip
      const int strip = step / plan.strip_steps;
      p = step - strip * plan.strip_steps;
      lead = min(p, F::kLead);
      p -= lead;
      const int column = strip * F::kColumns + lane;
      int n = column / plan.image_columns, at = column - n * plan.image_columns;
      to = lane < F::kColumns && n < plan.n && at < plan.w ? n * plan.h * plan.w + at : -1;
      const int seen = strip * (F::kColumns / F::kStride) + lane - F::kBefore;
      n = seen < 0 ? 0 : seen / plan.image_pixels, at = seen - n * plan.image_pixels;
      const bool inside = lane < F::kPixels && at >= 0 && n < plan.n && at < plan.q;
      here = inside ? (n * plan.p + p) * plan.q + at : -1;
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
        word = add_row<F>(sums, plan, grad_output, nonzeros, packed, shared, word, here, values);
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
    if (lead == 0) {
#pragma unroll
      for (int r = 0; r < F::kStride; ++r) {
        const int h = p * F::kStride - F::kPad + r;
        if (h < 0 || h >= plan.h) continue;
        if (kept >> r & 1) exchange<F, true, true>(sums[r], place(r));
        const auto store = [&](int column, const float (&sum)[F::kLane]) {
          // With stride 1 both images have the same size, and a column its gradient pixel's place.
          const int of_column = F::kStride == 1 ? __shfl_sync(kAll, here, column + F::kBefore)
                                                : __shfl_sync(kAll, to, column);
          if (of_column < 0) return;
          const int64_t at = int64_t(of_column + (F::kStride == 1 ? h - p : h) * plan.w) * plan.c;
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
                        sharing * plan.sharers * plan.shared_floats + lane;
          __syncwarp();  // all have read the values that are there
#pragma unroll
          for (int column = 0; column < F::kColumns; ++column)
#pragma unroll
            for (int i = 0; i < F::kLane; ++i)
              rows[share * plan.shared_floats + (column * F::kLane + i) * 32] = sums[r][column][i];
          named_barrier(1 + sharing, 32 * plan.sharers);
          for (int column = share; column < F::kColumns; column += plan.sharers) {
            float sum[F::kLane] = {};
            for (int other = 0; other < plan.sharers; ++other)
#pragma unroll
              for (int i = 0; i < F::kLane; ++i)
                sum[i] += rows[other * plan.shared_floats + (column * F::kLane + i) * 32];
            store(column, sum);
          }
          named_barrier(1 + sharing, 32 * plan.sharers);  // before the next row overwrites this one
        }
      }
      ++step;
    } else {
      --lead;
    }
#pragma unroll
    for (int r = 0; r < F::kRows; ++r)
#pragma unroll
      for (int column = 0; column < F::kColumns; ++column)
#pragma unroll
        for (int i = 0; i < F::kLane; ++i)
          sums[r][column][i] =
              r + F::kStride < F::kRows ? sums[(r + F::kStride) % F::kRows][column][i] : 0.0f;
    kept >>= F::kStride;
    ++p;
    if (here >= 0) here += plan.q;
  }
}

// Calls f(Form()) with the form for this problem.
template <class T, class F>
auto with_form(const ConvProblem& problem, F&& f) {
  const bool strided = problem.stride_w == 2;
  if (problem.r == 3) {
    return strided ? f(Form<T, 3, 2, 16, 2>()) : f(Form<T, 3, 1, 16, 2>());
  }
  // Also of few channels: of 2 for a lane compilers make multiply-adds with predicates, which zeros do not skip.
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
  plan.steps = static_cast<int>(ceil_div(columns, F::kColumns) * plan.strip_steps);
  // One block on each multiprocessor, if there are as many.
  const int64_t tiles = ceil_div(plan.c, F::kChannels);
  const int64_t most = std::max<int64_t>(device.multiprocessors / tiles, 1);
  // Runs of few rows see many rows around them. Warps that share a run have it longer, but do not
  // read the same weights at the same time.
  const int64_t steps = plan.steps / (most * kWarps);
  plan.sharers = F::kLead == 0 || steps >= kFewSteps ? 1 : steps > 1 ? 2 : 4;
  while (plan.sharers > 1 && plan.words % plan.sharers != 0 && plan.words < 4 * plan.sharers)
    plan.sharers /= 2;
  plan.shared_floats = std::max(32 * F::kValues, plan.sharers > 1 ? F::kRowFloats : 0);
  const int block_parts = kWarps / plan.sharers;
  plan.tile_blocks = static_cast<int>(std::min<int64_t>(most, ceil_div(plan.steps, block_parts)));
  plan.parts = plan.tile_blocks * block_parts;
  const int64_t bytes = int64_t(plan.k) * F::kPack * 4;
  plan.together = bytes > 2 * int64_t(device.shared_per_multiprocessor);
  return plan;
}

// The workspace: packed weights, sums that are put aside, costs of steps, cuts.
struct Workspace {
  int64_t packed, aside, costs, cuts, words;  // where each begins, in 32-bit words, and all of them
};

template <class F>
Workspace workspace_of(const ConvProblem& problem, const Plan& plan) {
  Workspace workspace = {};
  workspace.aside = packed_floats<F>(problem);
  workspace.costs = workspace.aside + blocks<F>(plan) * kWarps * F::kAside;
  workspace.cuts = workspace.costs + plan.steps;
  workspace.words = workspace.cuts + plan.parts + 1;
  return workspace;
}

template <class F>
cudaError_t run(const ConvCall& call, const Device& device, cudaStream_t stream) {
  using T = typename F::T;
  const Plan plan = make_plan<F>(call.problem, device);
  if (plan.parts == 0) return cudaSuccess;  // an empty batch
  const Workspace place = workspace_of<F>(call.problem, plan);
  float* const floats = static_cast<float*>(call.workspace);
  int32_t* const words = static_cast<int32_t*>(call.workspace);
  LaunchShape shape = {};
  shape.grid = dim3(static_cast<unsigned>(ceil_div(place.aside, kPrepareThreads) +
                                          ceil_div(plan.steps, kStepsOfBlock)));
  shape.block = dim3(kPrepareThreads);
  cudaError_t error =
      launch(prepare_kernel<F>, shape, stream, plan, static_cast<const T*>(call.operand),
             call.operand_strides, floats, place.aside, call.nonzeros, words + place.costs);
  if (error != cudaSuccess) return error;
  error = launch(cut_kernel, LaunchShape{dim3(1), dim3(kCutThreads), kCutShared}, stream,
                 words + place.costs, plan.steps, plan.parts, words + place.cuts);
  if (error != cudaSuccess) return error;
  shape = {};
  shape.grid = dim3(static_cast<unsigned>(blocks<F>(plan)));
  shape.block = dim3(kThreads);
  shape.shared = kWarps * plan.shared_floats * sizeof(float);
  shape.prefers = Prefers::kCache;  // for the weights
  return launch(agb_kernel<F>, shape, stream, plan, static_cast<const T*>(call.grad_output),
                call.nonzeros, floats, words + place.cuts, floats + place.aside,
                static_cast<T*>(call.result));
}

bool is_sparse(const ConvCall& call) { return call.nonzeros != nullptr && agb_suits(call); }

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
    return workspace_of<F>(call.problem, make_plan<F>(call.problem, device)).words * sizeof(float);
  });
}

cudaError_t agb(const ConvCall& call, const Device& device, cudaStream_t stream) {
  if (!is_sparse(call)) return agb_plain(call, stream);
  return with_element(call.dtype, [&](auto element) {
    return with_form<typename decltype(element)::type>(
        call.problem, [&](auto form) { return run<decltype(form)>(call, device, stream); });
  });
}

}  // namespace sparsebwd::cuda
