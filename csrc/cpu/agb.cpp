// SPDX-License-Identifier: Apache-2.0
#include "agb.h"

#include <string.h>

#include <algorithm>

namespace sparsebwd {

// Panels of [k][column][channel], zero behind the last channel of a group.
void Agb::start(const ConvPlan& plan, const TaskPool& pool) {
  plan_ = &plan;
  const ConvProblem& problem = plan.problem;
  const AgbPlan& agb = plan.agb;
  const AgbKernel& kernel = *agb.kernel;
  panels_.reserve(plan.k_blocks() * agb.channel_blocks * problem.r * agb.column_steps *
                  agb.panel_floats);
  parallel_tasks(pool, plan.k_blocks() * agb.channel_blocks, [&](int64_t task, int) {
    const WeightStrides& strides = plan.call.weight_strides;
    const int64_t block = task / agb.channel_blocks, channel_block = task % agb.channel_blocks;
    const int64_t c_begin = channel_block * kernel.group;
    const int64_t channels = std::min<int64_t>(kernel.group, agb.channels - c_begin);
    for (int64_t k = 0; k < plan.k_size(block); ++k)
      for (int64_t r = 0; r < problem.r; ++r)
        for (int64_t s = 0; s < problem.s; ++s) {
          float* to = panels_.data() + panel(block, channel_block, r, s / kernel.columns) +
                      (k * kernel.columns + s % kernel.columns) * kernel.group;
          load_weights((plan.k_begin(block) + k) * strides.k + c_begin * strides.c + r * strides.r +
                           s * strides.s,
                       channels, to);
          memset(to + channels, 0, (kernel.group - channels) * sizeof(float));
        }
  });
}

int64_t Agb::panel(int64_t k_block, int64_t channel_block, int64_t r, int64_t column_step) const {
  const AgbPlan& agb = plan_->agb;
  const int64_t group = k_block / agb.k_blocks;
  const int64_t row = (group * agb.channel_blocks + channel_block) * plan_->problem.r + r;
  return ((row * agb.column_steps + column_step) * agb.k_blocks + k_block % agb.k_blocks) *
         agb.panel_floats;
}

void Agb::load_weights(int64_t from, int64_t channels, float* to) const {
  const ConvBackward& call = plan_->call;
  const int64_t stride = call.weight_strides.c;
  if (call.weight_dtype == DType::kFloat32) {
    const float* w = static_cast<const float*>(call.weight) + from;
    if (stride == 1)
      memcpy(to, w, channels * sizeof(float));
    else
      for (int64_t c = 0; c < channels; ++c) to[c] = w[c * stride];
  } else {
    const uint16_t* w = static_cast<const uint16_t*>(call.weight) + from;
    for (int64_t c = 0; c < channels; ++c) to[c] = float_of_bfloat16(w[c * stride]);
  }
}

int64_t Agb::tasks(const PixelLists& lists) const {
  const int64_t bands = ceil_div(plan_->problem.h, plan_->agb.band_rows);
  return lists.groups() * bands * plan_->problem.groups * plan_->agb.channel_blocks;
}

void Agb::run(const PixelLists& lists, int64_t task, float* scratch) const {
  const ConvProblem& problem = plan_->problem;
  const AgbPlan& agb = plan_->agb;
  const int64_t channel_tasks = problem.groups * agb.channel_blocks;
  const int64_t channel_task = task % channel_tasks, band = task / channel_tasks;
  const int64_t bands = ceil_div(problem.h, agb.band_rows);
  const int64_t group_index = band / bands;
  const int64_t first = band % bands * agb.band_rows;
  const int64_t last = std::min(first + agb.band_rows, problem.h);
  const int64_t first_block = channel_task / agb.channel_blocks * agb.k_blocks;
  memset(scratch, 0, scratch_floats() * sizeof(float));
  for (int64_t r = 0; r < problem.r; ++r)
    for (int64_t column_step = 0; column_step < agb.column_steps; ++column_step)
      for (int64_t block = first_block; block < first_block + agb.k_blocks; ++block) {
        const float* weights =
            panels_.data() + panel(block, channel_task % agb.channel_blocks, r, column_step);
        float* sums = scratch + column_step * problem.dil_w * agb.kernel->group;
        for (int64_t h = first; h < last; ++h, sums += agb.row_floats()) {
          const int64_t offset = h + problem.pad_h - r * problem.dil_h;
          const int64_t p = offset / problem.stride_h;
          if (offset < 0 || offset % problem.stride_h != 0 || p >= plan_->p) continue;
          const PixelLists::Tile tile = lists.tile(group_index, p, block);
          agb.kernel->run(tile.list, tile.visits, tile.count, weights, sums);
        }
      }
  write(lists.group(group_index), {first, last - first}, channel_task, scratch);
}

// `rows` counts within an image here.
void Agb::write(Images images, Rows rows, int64_t channel_task, const float* sums) const {
  const ConvProblem& problem = plan_->problem;
  const AgbPlan& agb = plan_->agb;
  const ConvBackward& call = plan_->call;
  const int64_t group = agb.kernel->group;
  const int64_t block_begin = channel_task % agb.channel_blocks * group;
  const int64_t c = channel_task / agb.channel_blocks * agb.channels + block_begin;
  sums += problem.pad_w * group;
  for (int64_t n = images.begin; n < images.end; ++n, sums += agb.image_floats())
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = n * problem.h + rows.first + i;
      plan_->kernels.scatter_pixels(
          sums + i * agb.row_floats(), group, problem.w, std::min(group, agb.channels - block_begin),
          static_cast<char*>(call.grad_input) +
              (row * problem.w * problem.c + c) * dtype_size(call.dtype),
          call.dtype, problem.c);
    }
  plan_->kernels.finish_stores();
}

}  // namespace sparsebwd
