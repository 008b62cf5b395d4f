// SPDX-License-Identifier: Apache-2.0
// K1: sigma, threshold and stochastic pruning of a gradient.
//
// Idea. The exact threshold needs sum |g| before the first element can be pruned. So there are two
// passes: in one cooperative launch with a grid barrier between them, or, where other kernels need
// the device too, in launches of their own, which give the same bits. The first reads g, adds magnitudes, and parks what it
// read in shared memory as far as that goes. The second prunes, going backwards: what was not
// parked comes first and is read again, the last read of it first, since that may still be in the
// L2 cache. A predicted threshold needs no first pass: the second adds magnitudes as it prunes.
// Which it is follows from the history in device memory, so that a captured graph has both.
//
// Work. Four neighbouring channels, a quad, share the random words of one Philox counter. A thread
// takes one or two quads at a time, a pack, as vector loads can fetch them: ChannelsLast and
// Contiguous in prune.cuh. 32 neighbouring packs are a row, for a warp. Each block has a contiguous
// share of the rows, and its warps take turns. What a thread reads, parks and writes is its own;
// only sums cross threads, in an order that depends on the launch shape only.
//
// Positions. A pack's place (n, h, w, c) is the index of its first quad in mixed radix, found once
// for each thread by division; from row to row a constant is added to it, digit by digit.
//
// Sums. Few cards have many units for float64. So magnitudes are added as pairs of float32 without
// loss, and a pair for each 64 bytes or less becomes a float64.
//
// Cost. Memory is to be the limit. While g can be parked, on an H100 up to 29 MB, one launch reads it once
// and the result written once; beyond, g is read again but for what L2 keeps. At 3 TB/s and
// 1.75 GHz a multiprocessor can move 13 bytes a cycle, a float32 in 0.31 and a bfloat16 in 0.15
// cycles each way. The random numbers make the second pass heavy. Of its machine code for sm_90a, a
// pack of 4 float32 takes about 150 instructions and one of 8 bfloat16 200, of which 82 and 113 are
// for the integer pipe, 64 lanes a cycle: 0.32 and 0.22 cycles an element. So a predicted threshold
// is bound by memory (float32: 0.32 of 0.62 cycles, bfloat16: 0.24 of 0.31). With the exact one,
// the second pass only writes, and takes 0.32 instead of 0.31 and 0.22 instead of 0.15 cycles: at
// best 98 % and 83 % of the copy bandwidth. Multiplications, the integer ones of the random numbers
// too, have a pipe of their own, with less to do. Counted, not measured.
#include "prune.cuh"

#include <algorithm>

#include "element.cuh"
#include "kernels.h"
#include "launch.h"
#include "sparsebwd/integers.h"

namespace sparsebwd::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 32;  // of a block; one warp adds up what all of them have
constexpr int kThreads = kWarps * kWarp;
static_assert(kWarps == kWarp);
constexpr int kBytesInFlight = 64;  // that a thread of the first pass loads before it uses them

// ---- sums over threads, in a fixed order

struct Partial {
  double sum;  // of |g| of a block's share
  int64_t nonzeros;  // in its share, after pruning
};

struct Arguments {
  const void* g;
  void* out;
  uint32_t* nonzeros;
  float* stats;
  Partial* partials;  // of each block that has rows
  uint32_t blocks;
  bool prunes;  // else `pruning` holds nothing
  Pruning pruning;
  double count;  // of elements, at least 1
  int64_t rows;
  uint32_t parked;  // the first so many rows of a warp are parked
  Geometry geometry;
};

// The sum over the block, in all its threads. Anything that threads had written to global or shared
// memory before is visible to the block after it.
template <class Value>
__device__ Value block_sum(Value value) {
  auto* of_warp = reinterpret_cast<Value*>(dynamic_shared());
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[threadIdx.x % kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(~0u, value, distance);
  __syncthreads();  // the place can be used again
  return value;
}
constexpr size_t kSumBytes = kWarps * sizeof(double);

// The sum of a member of all blocks' partials, in all threads.
template <class Value>
__device__ Value grid_sum(const Arguments& a, Value Partial::* member) {
  Value value = 0;
  for (unsigned block = threadIdx.x; block < a.blocks; block += kThreads)
    value += a.partials[block].*member;
  return block_sum(value);
}

// ---- threshold

// Rounded to the element type; 0 if it is not finite.
template <class T>
__device__ __forceinline__ T threshold(float value) {
  const T tau = from_float<T>(value);
  return is_finite(to_float(tau)) ? tau : T{};
}

// The mean of the recorded values of sigma, 0 if there is none.
__device__ float mean_of_history(const int32_t* history) {
  const int recorded = history[0] < kSigmaHistory ? history[0] : kSigmaHistory;
  double sum = 0.0;
  for (int i = 0; i < recorded; ++i)
    sum += static_cast<double>(float_of_bits(static_cast<uint32_t>(history[1 + i])));
  return recorded > 0 ? static_cast<float>(sum / recorded) : 0.0f;
}

__device__ void record(int32_t* history, float sigma) {
  if (!(sigma > 0.0f && is_finite(sigma))) return;
  const int32_t recorded = history[0];
  history[1 + recorded % kSigmaHistory] = static_cast<int32_t>(float_bits(sigma));
  history[0] = recorded + 1;
}

__device__ float sigma_of(double sum, const Arguments& a) {
  return static_cast<float>(a.pruning.sigma_coefficient * (sum / a.count));
}

// The rows of a warp: `first`, first + kWarps, ...
struct Rows {
  int64_t first;
  uint32_t count;
};

__device__ Rows rows_of_warp(int64_t rows) {
  const int64_t first = rows * blockIdx.x / gridDim.x + threadIdx.x / kWarp;
  const int64_t end = rows * (blockIdx.x + 1) / gridDim.x;
  return {first, first < end ? static_cast<uint32_t>(ceil_div(end - first, kWarps)) : 0u};
}

// ---- the two passes

// Adds up magnitudes and parks packs, front to back. `position` moves from the first row to behind
// the last one.
template <class View>
__device__ __forceinline__ double sum_pass(const Arguments& a, uint32_t rows, Position& position,
                                           Parking<typename View::Pack, kThreads> parking) {
  using Pack = typename View::Pack;
  constexpr int kBatch = kBytesInFlight / static_cast<int>(sizeof(Pack));
  const auto* g = static_cast<const typename View::Storage*>(a.g);
  double sum = 0.0;
  for (uint32_t row = 0; row < rows; row += kBatch) {
    Pack packs[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row + i >= rows) continue;
      const int64_t offset = View::offset(position, a.geometry);
      packs[i] = View::load(g + offset, View::present(position, a.geometry), a.geometry);
      move(position, a.geometry.forward, a.geometry);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (row + i < rows && row + i < a.parked) parking.put(row + i, packs[i]);
    sum += sum_of_magnitudes<typename View::Element>(packs);
  }
  return sum;
}

struct Pruned {
  double sum;  // of magnitudes before pruning, unless a pass before had it
  uint32_t nonzeros;  // after
};

// Prunes and writes, back to front; `position` is behind the last row. After the first pass, rows
// that it parked are not read again; without it, magnitudes are added up here. What is written
// last stays in the L2 cache for who reads it next, the rest makes room for what is to be read.
template <class View, bool AfterSum>
__device__ __forceinline__ Pruned prune_pass(const Arguments& a, Rows rows, Position position,
                                             Parking<typename View::Pack, kThreads> parking,
                                             typename View::Element tau, const PruneSpec& spec) {
  using Pack = typename View::Pack;
  const auto* g = static_cast<const typename View::Storage*>(a.g);
  auto* out = static_cast<typename View::Storage*>(a.out);
  using Element = typename View::Element;
  Pruner<Element> pruner(tau);
  uint32_t image = ~0u;  // whose threshold the pruner has, where images have their own
  Pruned result = {};
  for (uint32_t left = rows.count; left > 0;) {
    --left;
    move(position, a.geometry.backward, a.geometry);
    const int64_t offset = View::offset(position, a.geometry);
    const int present = View::present(position, a.geometry);
    const bool parked = left < a.parked;
    Pack pack =
        AfterSum && parked ? parking.get(left) : View::load(g + offset, present, a.geometry);
    if (!AfterSum) {
      const Pack one[] = {pack};
      result.sum += sum_of_magnitudes<Element>(one);
    }
    if (a.pruning.scales && present && position.digit[3] != image) {
      image = position.digit[3];
      pruner = Pruner<Element>(threshold<Element>(to_float(tau) * a.pruning.scales[image]));
    }
    typename View::Random random;
    View::draw(spec, position, a.geometry, random);
    const uint32_t bits = pruner(pack, random);
    result.nonzeros += __popc(bits);
    if (out) View::store(out + offset, present, pack, !parked, a.geometry);
    if constexpr (View::kHasBits)
      if (a.nonzeros) View::store_bits(a.nonzeros, position, threadIdx.x % kWarp, bits, a.geometry);
  }
  return result;
}

// ---- the kernels: sums, pruning, and what one block does at the end

template <class View>
using ParkingOf = Parking<typename View::Pack, kThreads>;

// Sigma that the threshold follows from, as predicted; 0: it is to be that of this very gradient.
__device__ float predicted_sigma(const Arguments& a) {
  return a.pruning.sigma_history ? mean_of_history(a.pruning.sigma_history) : 0.0f;
}

// As the blocks' sums have it, once all are there.
__device__ float exact_sigma(const Arguments& a) { return sigma_of(grid_sum(a, &Partial::sum), a); }

template <class Element>
__device__ Element tau_of(const Arguments& a, float sigma) {
  if (!a.prunes) return {};
  return threshold<Element>(static_cast<float>(static_cast<double>(sigma) * a.pruning.quantile));
}

// Of the first row of the warp, or behind its last one.
template <class View>
__device__ Position start(const Arguments& a, const Rows& rows, bool behind) {
  const int64_t row = rows.first + (behind ? static_cast<int64_t>(rows.count) * kWarps : 0);
  return position_of(row * kWarp + threadIdx.x % kWarp, View::kStep, a.geometry);
}

template <class View>
__device__ __forceinline__ void sum_share(const Arguments& a, const Rows& rows, Position& position,
                                          ParkingOf<View> parking) {
  const double sum = block_sum(sum_pass<View>(a, rows.count, position, parking));
  if (threadIdx.x == 0) a.partials[blockIdx.x].sum = sum;
}

template <class View, bool AfterSum>
__device__ __forceinline__ void prune_share(const Arguments& a, const Rows& rows,
                                            const Position& position, ParkingOf<View> parking,
                                            float sigma) {
  const auto tau = tau_of<typename View::Element>(a, sigma);
  PruneSpec spec = {};
  if (a.prunes) spec = make_prune_spec(to_float(tau), a.pruning.key[0], a.pruning.key[1]);
  const Pruned pruned = prune_pass<View, AfterSum>(a, rows, position, parking, tau, spec);
  const int64_t nonzeros = block_sum(static_cast<int64_t>(pruned.nonzeros));
  if (threadIdx.x == 0) a.partials[blockIdx.x].nonzeros = nonzeros;
  if (AfterSum) return;
  const double sum = block_sum(pruned.sum);
  if (threadIdx.x == 0) a.partials[blockIdx.x].sum = sum;
}

// `sigma`: of the threshold.
template <class View>
__device__ __forceinline__ void finish(const Arguments& a, float sigma, bool exact) {
  const float own = exact ? sigma : exact_sigma(a);
  const int64_t nonzeros = grid_sum(a, &Partial::nonzeros);
  if (threadIdx.x > 0) return;
  a.stats[0] = to_float(tau_of<typename View::Element>(a, sigma));
  a.stats[1] = a.prunes ? own : 0.0f;
  a.stats[2] = static_cast<float>(static_cast<double>(nonzeros) / a.count);
  if (a.pruning.sigma_history) record(a.pruning.sigma_history, own);
}

// All in one: the blocks wait for each other.
template <class View>
__global__ void __launch_bounds__(kThreads) prune_kernel(const Arguments a) {
  const Rows rows = rows_of_warp(a.rows);
  const ParkingOf<View> parking(dynamic_shared() + kSumBytes);
  float sigma = predicted_sigma(a);
  const bool exact = a.prunes && !(sigma > 0.0f);
  Position position = start<View>(a, rows, !exact);
  if (exact) {
    sum_share<View>(a, rows, position, parking);
    grid_sync();
    sigma = exact_sigma(a);
    prune_share<View, true>(a, rows, position, parking, sigma);
  } else {
    prune_share<View, false>(a, rows, position, parking, sigma);
  }
  grid_sync();
  if (blockIdx.x == 0) finish<View>(a, sigma, exact);
}

// The same in three, none of which parks anything: those before have ended.
template <class View>
__global__ void __launch_bounds__(kThreads) prune_sum_kernel(const Arguments a) {
  if (predicted_sigma(a) > 0.0f) return;
  const Rows rows = rows_of_warp(a.rows);
  Position position = start<View>(a, rows, false);
  sum_share<View>(a, rows, position, ParkingOf<View>(dynamic_shared() + kSumBytes));
}

template <class View>
__global__ void __launch_bounds__(kThreads) prune_rows_kernel(const Arguments a) {
  const Rows rows = rows_of_warp(a.rows);
  const ParkingOf<View> parking(dynamic_shared() + kSumBytes);
  const Position position = start<View>(a, rows, true);
  const float sigma = predicted_sigma(a);
  if (a.prunes && !(sigma > 0.0f))
    prune_share<View, true>(a, rows, position, parking, exact_sigma(a));
  else prune_share<View, false>(a, rows, position, parking, sigma);
}

template <class View>
__global__ void __launch_bounds__(kThreads) prune_stats_kernel(const Arguments a) {
  const float sigma = predicted_sigma(a);
  const bool exact = a.prunes && !(sigma > 0.0f);
  finish<View>(a, exact ? exact_sigma(a) : sigma, exact);
}

// ---- launch

// The step by `packs` packs, each of which counts `step` in the innermost loop.
Step step_of(const Geometry& geometry, int64_t packs, int step) {
  Step result = {};
  int64_t index = packs * step;
  for (int i = 0; i < 3; ++i) {
    const int64_t radix = geometry.radix[i], digit = (index % radix + radix) % radix;
    result.delta[i] = static_cast<int32_t>(digit - radix + (i > 0));
    index = (index - digit) / radix;
  }
  result.delta[3] = static_cast<int32_t>(index + 1);
  result.packs = packs;
  return result;
}

// `nonzeros`: whether lanes that share a word of them have to be neighbours.
template <class View>
Geometry geometry_of(const PruneShape& shape, bool nonzeros) {
  const int64_t c = shape.c, plane = shape.h * shape.w;
  Geometry geometry = {};
  const auto set_loops = [&](const int64_t (&radices)[3], const int64_t (&strides)[4]) {
    // Of an empty tensor no loop has an iteration; divisions by radices are done all the same.
    for (int i = 0; i < 3; ++i)
      geometry.radix[i] = static_cast<uint32_t>(std::max<int64_t>(radices[i], 1));
    std::copy_n(strides, 4, geometry.stride);
  };
  if (shape.channels_last) {
    constexpr int64_t kElements = 4 * View::kQuads;
    const int64_t packs = ceil_div(c, kElements);
    int64_t packs_of_word = 1;
    if (nonzeros)
      while (packs_of_word < std::min(packs, 32 / kElements)) packs_of_word *= 2;
    const int64_t padded = ceil_div(packs, packs_of_word) * packs_of_word;
    set_loops({padded, shape.w, shape.h}, {kElements, c, shape.w * c, plane * c});
    geometry.packs = static_cast<uint32_t>(packs);
    geometry.dense = padded * kElements == c;
    for (int i = 0; i < 3; ++i) {
      const bool shares = 1 << i < packs_of_word;
      geometry.shares_word[i] = shares ? ~0u : 0u;
      geometry.log2_packs_of_word += shares;
    }
  } else {
    set_loops({shape.w, shape.h, ceil_div(c, 4)}, {1, shape.w, 4 * plane, c * plane});
  }
  geometry.outer = c > 0 && plane > 0 ? static_cast<uint32_t>(shape.n) : 0;
  geometry.plane = plane;
  geometry.channels = static_cast<uint32_t>(c);
  geometry.width = static_cast<uint32_t>(shape.w);
  geometry.forward = step_of(geometry, kThreads, View::kStep);
  geometry.backward = step_of(geometry, -kThreads, View::kStep);
  return geometry;
}

template <class View>
cudaError_t launch_view(const PruneCall& call, const Device& device, cudaStream_t stream) {
  const PruneShape& shape = call.shape;
  Arguments a = {};
  a.g = call.g;
  a.out = call.out;
  a.nonzeros = call.nonzeros;
  a.stats = call.stats;
  a.partials = static_cast<Partial*>(call.workspace);
  a.prunes = call.pruning != nullptr;
  if (a.prunes) a.pruning = *call.pruning;
  a.count = static_cast<double>(std::max<int64_t>(shape.n * shape.c * shape.h * shape.w, 1));
  a.geometry = geometry_of<View>(shape, call.nonzeros != nullptr);
  int64_t quads = a.geometry.outer;
  for (const uint32_t radix : a.geometry.radix) quads *= radix;
  a.rows = ceil_div(quads / View::kStep, kWarp);

  const int64_t blocks = std::clamp<int64_t>(ceil_div(a.rows, kWarps), 1, device.multiprocessors);
  constexpr int64_t kRowBytes = kThreads * sizeof(typename View::Pack);  // of all warps
  const int64_t room =
      std::max<int64_t>(device.shared_per_block - static_cast<int64_t>(kSumBytes), 0) / kRowBytes;
  a.blocks = static_cast<uint32_t>(blocks);
  // A block has at most one row more than others, so a warp has at most that many.
  a.parked = static_cast<uint32_t>(std::min(room, ceil_div(ceil_div(a.rows, blocks), kWarps)));
  LaunchShape launch_shape;
  launch_shape.grid = dim3(static_cast<unsigned>(blocks));
  launch_shape.block = dim3(kThreads);
  if (device.cooperative) {
    launch_shape.shared = kSumBytes + static_cast<size_t>(a.parked * kRowBytes);
    launch_shape.cooperative = true;
    const cudaError_t error = launch(prune_kernel<View>, launch_shape, stream, a);
    // Else part of the device is reserved for others, and nothing was launched.
    if (error != cudaErrorCooperativeLaunchTooLarge) return error;
    cudaGetLastError();
    launch_shape.cooperative = false;
  }
  a.parked = 0;
  launch_shape.shared = kSumBytes;
  cudaError_t error = cudaSuccess;
  if (a.prunes) error = launch(prune_sum_kernel<View>, launch_shape, stream, a);
  if (error == cudaSuccess) error = launch(prune_rows_kernel<View>, launch_shape, stream, a);
  launch_shape.grid = dim3(1);
  if (error == cudaSuccess) error = launch(prune_stats_kernel<View>, launch_shape, stream, a);
  return error;
}

}  // namespace

size_t prune_workspace(const PruneCall&, const Device& device) {
  return static_cast<size_t>(device.multiprocessors) * sizeof(Partial);
}

cudaError_t prune(const PruneCall& call, const Device& device, cudaStream_t stream) {
  const PruneShape& shape = call.shape;
  for (const int64_t size : {shape.n, shape.c, shape.h, shape.w})
    if (size > INT32_MAX) return cudaErrorInvalidValue;
  if (call.nonzeros && !shape.channels_last) return cudaErrorInvalidValue;
  return with_element(call.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // What vector loads fetch along the innermost dimension.
    const size_t bytes = shape.channels_last ? 16 : 2 * sizeof(T);
    const int64_t inner = shape.channels_last ? shape.c : shape.h * shape.w;
    const bool vectors = static_cast<size_t>(inner) * sizeof(T) % bytes == 0 &&
                         is_aligned(call.g, bytes) && is_aligned(call.out, bytes);
    if (shape.channels_last)
      return vectors ? launch_view<ChannelsLast<T, true>>(call, device, stream)
                     : launch_view<ChannelsLast<T, false>>(call, device, stream);
    return vectors ? launch_view<Contiguous<T, true>>(call, device, stream)
                   : launch_view<Contiguous<T, false>>(call, device, stream);
  });
}

}  // namespace sparsebwd::cuda
