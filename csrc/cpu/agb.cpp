// SPDX-License-Identifier: Apache-2.0
#include "agb.h"

#include <string.h>

#include <algorithm>

namespace sparsebwd {

// Groups of images and bands of rows that use a panel one after the other, up to which each packs it anew: it
// then stays in L1, and large weights are not written and read again.
constexpr int64_t kMostRepacked = 2;

// Pieces of so many filters are fetched ahead: they are too far apart for the hardware to do it.
constexpr int64_t kPrefetchedFilters = 8;

void Agb::start(const ConvPlan& plan, const TaskPool& pool, bool at_once) {
  plan_ = &plan;
  const AgbPlan& agb = plan.agb;
  const int64_t uses = ceil_div(plan.problem.n, agb.images) * plan.bands();
  packed_ = !at_once || uses > kMostRepacked;
  if (!packed_) return;
  const int64_t column_steps = plan.problem.r * agb.column_steps;
  panels_.reserve(plan.k_blocks() * agb.channel_blocks * column_steps * agb.panel_floats);
  parallel_tasks(pool, plan.k_blocks() * agb.channel_blocks, [&](int64_t task, int) {
    for (int64_t i = 0; i < column_steps; ++i) {
      const Panel panel = {task / agb.channel_blocks, task % agb.channel_blocks,
                           i / agb.column_steps, i % agb.column_steps};
      pack(panel, panels_.data() + index(panel) * agb.panel_floats);
    }
  });
}

// Consecutive for a task.
int64_t Agb::index(Panel panel) const {
  const AgbPlan& agb = plan_->agb;
  const int64_t group = panel.k_block / agb.k_blocks;
  const int64_t row =
      (group * agb.channel_blocks + panel.channel_block) * plan_->problem.r + panel.r;
  return (row * agb.column_steps + panel.column_step) * agb.k_blocks + panel.k_block % agb.k_blocks;
}

// [k][column][channel], zero behind the last channel of a convolution group.
void Agb::pack(Panel panel, float* to) const {
  const ConvBackward& call = plan_->call;
  const AgbPlan& agb = plan_->agb;
  const int64_t group = agb.kernel->group, columns = agb.kernel->columns;
  const int64_t c = panel.channel_block * group;
  const int64_t channels = std::min(group, agb.channels - c);
  const WeightStrides& strides = call.weight_strides;
  const int64_t from = plan_->k_begin(panel.k_block) * strides.k + c * strides.c +
                       panel.r * strides.r + panel.column_step * columns * strides.s;
  const int64_t size = dtype_size(call.weight_dtype);
  for (int64_t k = 0; k < plan_->k_size(panel.k_block); ++k, to += columns * group) {
    const char* w = static_cast<const char*>(call.weight) + (from + k * strides.k) * size;
    if (strides.c == 1) {
      for (int64_t s = 0; s < columns; ++s)
        for (int64_t byte = 0; byte < channels * size; byte += 64)
          __builtin_prefetch(w + (kPrefetchedFilters * strides.k + s * strides.s) * size + byte);
      plan_->kernels.gather_pixels(w, call.weight_dtype, strides.s, columns, channels, to, group);
      continue;
    }
    for (int64_t s = 0; s < columns; ++s) {
      float* column = to + s * group;
      if (call.weight_dtype == DType::kFloat32)
        for (int64_t i = 0; i < channels; ++i)
          column[i] = reinterpret_cast<const float*>(w)[i * strides.c + s * strides.s];
      else
        for (int64_t i = 0; i < channels; ++i)
          column[i] = float_of_bfloat16(
              reinterpret_cast<const uint16_t*>(w)[i * strides.c + s * strides.s]);
      memset(column + channels, 0, (group - channels) * sizeof(float));
    }
  }
}

int64_t Agb::scratch_floats() const {
  const AgbPlan& agb = plan_->agb;
  return agb.panel_floats + agb.images * agb.image_floats();
}

int64_t Agb::tasks(const PixelLists& lists) const {
  return lists.groups() * plan_->bands() * plan_->problem.groups * plan_->agb.channel_blocks;
}

void Agb::run(const PixelLists& lists, int64_t task, float* scratch) const {
  const ConvProblem& problem = plan_->problem;
  const AgbPlan& agb = plan_->agb;
  // One after the other they use the same weights.
  const int64_t bands = lists.groups() * plan_->bands();
  const int64_t channel_task = task / bands, band = task % bands;
  const int64_t group_index = band / plan_->bands();
  const int64_t first = band % plan_->bands() * agb.band_rows;
  const int64_t last = std::min(first + agb.band_rows, problem.h);
  const int64_t first_block = channel_task / agb.channel_blocks * agb.k_blocks;
  float* const own_panel = scratch;
  scratch += agb.panel_floats;
  memset(scratch, 0, agb.images * agb.image_floats() * sizeof(float));
  for (int64_t r = 0; r < problem.r; ++r)
    for (int64_t column_step = 0; column_step < agb.column_steps; ++column_step)
      for (int64_t block = first_block; block < first_block + agb.k_blocks; ++block) {
        const Panel panel = {block, channel_task % agb.channel_blocks, r, column_step};
        if (!packed_) pack(panel, own_panel);
        const float* weights =
            packed_ ? panels_.data() + index(panel) * agb.panel_floats : own_panel;
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
  if (call.grad_input_planes) {
    const int64_t plane = problem.h * problem.w;
    const int64_t channels = std::min(group, agb.channels - block_begin);
    // Rows without padding between them are one.
    const int64_t together = agb.padded_w == problem.w ? rows.count : 1;
    for (int64_t n = images.begin; n < images.end; ++n, sums += agb.image_floats())
      for (int64_t i = 0; i < rows.count; i += together)
        plan_->kernels.transpose(sums + i * agb.row_floats(), group, 1, together * problem.w,
                                 channels,
                                 static_cast<float*>(call.grad_input) +
                                     (n * problem.c + c) * plane + (rows.first + i) * problem.w,
                                 plane);
    return;
  }
  for (int64_t n = images.begin; n < images.end; ++n, sums += agb.image_floats())
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = n * problem.h + rows.first + i;
      plan_->kernels.scatter_pixels(sums + i * agb.row_floats(), group, problem.w,
                                    std::min(group, agb.channels - block_begin),
                                    static_cast<char*>(call.grad_input) +
                                        (row * problem.w * problem.c + c) * dtype_size(call.dtype),
                                    call.dtype, problem.c);
    }
  plan_->kernels.finish_stores();
}

}  // namespace sparsebwd
