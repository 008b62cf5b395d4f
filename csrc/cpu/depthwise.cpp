// SPDX-License-Identifier: Apache-2.0
#include "depthwise.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "buffer.h"
#include "depthwise_plan.h"
#include "sparsebwd/integers.h"

namespace sparsebwd {
namespace {

// dx is written past the caches if it is too large to stay in them.
constexpr int64_t kStreamedBytes = 8 * 1024 * 1024;
// A workspace that has grown larger is not kept for the next call.
constexpr int64_t kKeptBytes = 256 * 1024 * 1024;
// Pixels whose products are added up before they go to the sums in memory.
constexpr int64_t kChain = 256;

struct Workspace {
  Buffer<float>
      sums;     // of grad_weight, [group of images][channel block][vector][multiple][tap][lane]
  Buffer<float> weights;  // [channel block][vector][multiple][tap][lane]
  Buffer<float> scratch;  // of each worker
};

float load(const void* p, DType dtype, int64_t i) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(p)[i]
                                  : float_of_bfloat16(static_cast<const uint16_t*>(p)[i]);
}

void store(void* p, DType dtype, int64_t i, float value) {
  if (dtype == DType::kFloat32) static_cast<float*>(p)[i] = value;
  else static_cast<uint16_t*>(p)[i] = bfloat16_of_float(value);
}

class Backward {
 public:
  Backward(const DepthwiseKernels& kernels, const TaskPool& pool, const DepthwiseBackward& call,
           Workspace& workspace)
      : kernels_(kernels),
        pool_(pool),
        call_(call),
        problem_(call.problem),
        plan_(call.problem, kernels.lanes, reads_in_place(call)),
        agb_(call.grad_input.data != nullptr),
        wgc_(call.grad_weight != nullptr),
        run_(agb_ && wgc_ ? kernels.both
             : agb_       ? kernels.agb
                          : kernels.wgc),
        workspace_(workspace) {}

  // A task is a block of channels of a group of images, with sums of the weight's gradient of its
  // own: neither depends on the number of threads.
  void run() {
    const int64_t group_sums = plan_.blocks * plan_.block_floats();
    if (wgc_) workspace_.sums.reserve(plan_.groups * group_sums);
    scratch_stride_ = plan_.scratch_floats();
    workspace_.scratch.reserve(scratch_stride_ * pool_.threads);
    std::vector<char> cleared(pool_.threads, 0);
    const int64_t tasks = problem_.n > 0 ? plan_.groups * plan_.blocks : 0;
    if (agb_ && tasks) {
      workspace_.weights.reserve(plan_.blocks * plan_.block_floats());
      parallel_tasks(pool_, plan_.blocks,
                     [&](int64_t block, int) { pack_weights(block, weights(block)); });
    }
    parallel_tasks(pool_, tasks, [&](int64_t task, int worker) {
      float* const scratch = workspace_.scratch.data() + worker * scratch_stride_;
      // What no task writes: the columns beside the gradient are zero.
      if (!cleared[worker]) std::fill_n(scratch, plan_.g_floats(), 0.0f);
      cleared[worker] = 1;
      run_task(task / plan_.blocks, task % plan_.blocks, scratch);
    });
    if (wgc_) parallel_tasks(pool_, plan_.blocks, [&](int64_t block, int) { finish(block); });
  }

 private:
  static bool reads_in_place(const DepthwiseBackward& call) {
    return call.dtype == DType::kFloat32 && !call.input.planes && !call.grad_input.planes;
  }

  float* sums(int64_t group, int64_t block) const {
    return workspace_.sums.data() + (group * plan_.blocks + block) * plan_.block_floats();
  }
  float* weights(int64_t block) const {
    return workspace_.weights.data() + block * plan_.block_floats();
  }
  int64_t channels(int64_t block) const {
    return std::min(plan_.channels, problem_.c - block * plan_.channels);
  }
  int64_t vectors(int64_t block) const { return ceil_div(channels(block), kernels_.lanes); }

  // `rows` rows from the first one on of an image, and every step-th of its channels, from vector v of
  // the block on.
  DepthwisePixels pixels(const Activation& from, int64_t image, int64_t all_channels,
                         int64_t height, int64_t width, int64_t first, int64_t rows,
                         int64_t channel, int64_t step, int64_t block, int64_t v = 0) const {
    DepthwisePixels result;
    const int64_t pixel = from.planes ? 1 : all_channels;
    const int64_t plane = from.planes ? height * width : 1;
    channel += v * kernels_.lanes * step;
    const int64_t start =
        image * all_channels * height * width + first * width * pixel + channel * plane;
    result.data = static_cast<char*>(from.data) + start * dtype_size(call_.dtype);
    result.dtype = call_.dtype;
    result.pixel_stride = pixel;
    result.channel_stride = plane * step;
    result.pixels = rows * width;
    result.channels = channels(block) - v * kernels_.lanes;
    return result;
  }

  // Where a kernel finds vector v of the input or of its gradient, from row `first` of the chunk's phase on.
  struct Place {
    float* data;
    int64_t step, pitch;
  };
  Place place(const Activation& tensor, bool in_place, float* tile, const DepthwiseChunk& chunk,
              int64_t image, int64_t first, int64_t block, int64_t v) const {
    if (!in_place || !tensor.data)
      return {tile + v * plan_.x_stride + chunk.x_offset, plan_.lanes, plan_.x_pitch};
    const int64_t row = image * problem_.h + first * problem_.stride_h + chunk.row_phase;
    const int64_t pixel = row * problem_.w + chunk.column_phase;
    const int64_t channel = block * plan_.channels + v * plan_.lanes;
    return {static_cast<float*>(tensor.data) + pixel * problem_.c + channel,
            problem_.stride_w * problem_.c, problem_.stride_h * problem_.w * problem_.c};
  }

  void run_task(int64_t group, int64_t block, float* scratch) {
    if (wgc_) std::fill_n(sums(group, block), plan_.block_floats(), 0.0f);
    const int64_t begin = problem_.n * group / plan_.groups;
    const int64_t end = problem_.n * (group + 1) / plan_.groups;
    for (int64_t image = begin; image < end; ++image)
      for (int64_t first = 0; first < plan_.rows.positions; first += plan_.band)
        run_band(group, block, image, first, scratch);
    kernels_.finish_stores();
  }

  // Rows first .. first + band of every phase.
  void run_band(int64_t group, int64_t block, int64_t image, int64_t first, float* scratch) {
    const int64_t channel = block * plan_.channels;
    const int64_t multiple = plan_.multiple;
    const int64_t band = std::min(plan_.band, plan_.rows.positions - first);
    // Rows of the input and of the gradient, and the gradient's place in the tile.
    const int64_t row = first * problem_.stride_h;
    const int64_t rows = std::min(band * problem_.stride_h, problem_.h - row);
    const int64_t top = first + plan_.rows.least;
    const int64_t g_begin = std::min(std::max<int64_t>(top, 0), problem_.p());
    const int64_t g_end = std::max(g_begin, std::min(top + band + plan_.rows.span(), problem_.p()));

    float* const g = scratch;
    float* const x = g + plan_.g_floats();
    float* const dx = x + plan_.x_floats();
    // Vectors that the kernels find in the tensors; the others are in the tiles.
    const int64_t whole = plan_.in_place ? channels(block) / kernels_.lanes : 0;
    const DepthwiseTile x_tile = {x + whole * plan_.x_stride, plan_.x_offsets.data(),
                                  plan_.x_stride};
    const DepthwiseTile dx_tile = {dx + whole * plan_.x_stride, plan_.x_offsets.data(),
                                   plan_.x_stride};
    if (wgc_ && whole < vectors(block))
      kernels_.gather(pixels(call_.input, image, problem_.c, problem_.h, problem_.w, row, rows,
                             channel, 1, block, whole),
                      x_tile);
    for (int64_t i = 0; i < multiple; ++i) {
      const int64_t above = g_begin - top;  // rows of the tile
      clear_rows(block, g, 0, above);
      clear_rows(block, g, g_end - top, band + plan_.rows.span());
      const DepthwiseTile g_tile = {g, plan_.g_offsets.data() + above * problem_.q(),
                                    plan_.g_stride};
      kernels_.gather(pixels(call_.grad_output, image, problem_.k, problem_.p(), problem_.q(),
                             g_begin, g_end - g_begin, channel * multiple + i, multiple, block),
                      g_tile);
      for (int64_t v = 0; v < vectors(block); ++v) {
        const int64_t taps = (v * multiple + i) * plan_.vector_taps();
        for (const DepthwiseChunk& chunk : plan_.chunks)
          run_chunk(chunk, first, band, i == 0 && chunk.first, g + v * plan_.g_stride,
                    place(call_.input, v < whole, x, chunk, image, first, block, v),
                    place(call_.grad_input, v < whole, dx, chunk, image, first, block, v),
                    agb_ ? weights(block) + taps : nullptr,
                    wgc_ ? sums(group, block) + taps : nullptr);
      }
    }
    if (agb_ && whole < vectors(block)) {
      const bool stream =
          problem_.n * problem_.c * problem_.h * problem_.w * dtype_size(call_.dtype) >=
          kStreamedBytes;
      kernels_.scatter(dx_tile,
                       pixels(call_.grad_input, image, problem_.c, problem_.h, problem_.w, row,
                              rows, channel, 1, block, whole),
                       stream && whole == 0);
    }
  }

  void clear_rows(int64_t block, float* g, int64_t begin, int64_t end) const {
    for (int64_t v = 0; begin < end && v < vectors(block); ++v)
      std::fill(g + v * plan_.g_stride + begin * plan_.g_pitch,
                g + v * plan_.g_stride + end * plan_.g_pitch, 0.0f);
  }

  // Rows first .. first + band of the phase.
  void run_chunk(const DepthwiseChunk& chunk, int64_t first, int64_t band, bool overwrite,
                 const float* g, const Place& x, const Place& dx, const float* weights,
                 float* sums) const {
    DepthwiseRun run;
    run.offsets = chunk.offsets;
    run.g_pitch = plan_.g_pitch;
    run.x_step = x.step;
    run.x_pitch = x.pitch;
    run.dx_step = dx.step;
    run.dx_pitch = dx.pitch;
    run.accumulate = !overwrite;
    run.weight = weights ? weights + chunk.first_tap * kernels_.lanes : nullptr;
    run.grad_weight = sums ? sums + chunk.first_tap * kernels_.lanes : nullptr;
    // Rows that meet the gradient at all.
    const int64_t rows = std::min(band, chunk.rows - first);
    const int64_t begin = std::max<int64_t>(0, -chunk.most - first);
    const int64_t end = chunk.taps ? std::min(rows, problem_.p() - chunk.least - first) : 0;
    if (overwrite && agb_ && (begin > 0 || end < rows)) {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < chunk.columns; ++column)
          std::fill_n(dx.data + row * dx.pitch + column * dx.step, kernels_.lanes, 0.0f);
      run.accumulate = true;
    }
    // Short sums: rounding errors grow with the length of a chain of additions.
    const int64_t most_columns = std::min(chunk.columns, kChain);
    const int64_t most_rows = std::max<int64_t>(1, kChain / std::max<int64_t>(most_columns, 1));
    for (int64_t row = begin; row < end; row += most_rows)
      for (int64_t column = 0; column < chunk.columns; column += most_columns) {
        run.rows = std::min(most_rows, end - row);
        run.columns = std::min(most_columns, chunk.columns - column);
        run.g = g + row * run.g_pitch + column * kernels_.lanes;
        run.x = x.data + row * x.pitch + column * x.step;
        run.dx = dx.data + row * dx.pitch + column * dx.step;
        run_[chunk.taps - 1](run);
      }
  }

  // Calls f(index in the block's sums, output channel, row and column of the filter).
  template <class F>
  void for_taps(int64_t block, F f) const {
    for (int64_t v = 0; v < vectors(block); ++v)
      for (int64_t i = 0; i < plan_.multiple; ++i)
        for (int64_t tap = 0; tap < problem_.r * problem_.s; ++tap) {
          const int64_t start =
              (v * plan_.multiple + i) * plan_.vector_taps() + tap * kernels_.lanes;
          const int64_t channel = block * plan_.channels + v * kernels_.lanes;
          const int64_t lanes = std::min<int64_t>(kernels_.lanes, problem_.c - channel);
          for (int64_t lane = 0; lane < lanes; ++lane)
            f(start + lane, (channel + lane) * plan_.multiple + i, plan_.order[tap] / problem_.s,
              plan_.order[tap] % problem_.s);
        }
  }

  void pack_weights(int64_t block, float* weights) const {
    std::fill_n(weights, plan_.block_floats(), 0.0f);
    const WeightStrides& strides = call_.weight_strides;
    for_taps(block, [&](int64_t index, int64_t k, int64_t r, int64_t s) {
      weights[index] =
          load(call_.weight, call_.weight_dtype, k * strides.k + r * strides.r + s * strides.s);
    });
  }

  void finish(int64_t block) const {
    float* const total = sums(0, block);
    if (problem_.n == 0) std::fill_n(total, plan_.block_floats(), 0.0f);
    for (int64_t group = 1; problem_.n > 0 && group < plan_.groups; ++group) {
      const float* const part = sums(group, block);
      for (int64_t i = 0; i < plan_.block_floats(); ++i) total[i] += part[i];
    }
    const WeightStrides& strides = call_.grad_weight_strides;
    for_taps(block, [&](int64_t index, int64_t k, int64_t r, int64_t s) {
      store(call_.grad_weight, call_.grad_weight_dtype,
            k * strides.k + r * strides.r + s * strides.s, total[index]);
    });
  }

  const DepthwiseKernels& kernels_;
  const TaskPool& pool_;
  const DepthwiseBackward& call_;
  const ConvProblem& problem_;
  const DepthwisePlan plan_;
  const bool agb_, wgc_;
  const DepthwiseKernel* const run_;
  Workspace& workspace_;
  int64_t scratch_stride_ = 0;  // floats
};

}  // namespace

void depthwise_backward(const DepthwiseKernels& kernels, const TaskPool& pool,
                        const DepthwiseBackward& call) {
  static thread_local std::unique_ptr<Workspace> workspace;
  if (!workspace) workspace = std::make_unique<Workspace>();
  Backward(kernels, pool, call, *workspace).run();
  if (held_bytes() > kKeptBytes) workspace.reset();
}

}  // namespace sparsebwd
