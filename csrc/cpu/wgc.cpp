// SPDX-License-Identifier: Apache-2.0
#include "wgc.h"

#include <string.h>

#include <algorithm>
#include <type_traits>

namespace sparsebwd {
namespace {

// A packed panel is filled by whole vectors, the last of which may end behind it.
constexpr int64_t kPanelFloats = kMaxPanelBytes / 4 + 16;

}  // namespace

int64_t Wgc::sum_floats(const ConvPlan& plan) {
  return plan.wgc.channel_blocks * plan.problem.k * plan.wgc.filter_floats;
}

void Wgc::start(const ConvPlan& plan, int64_t groups, bool at_once) {
  plan_ = &plan;
  groups_ = groups;
  at_once_ = at_once;
  if (at_once) return;
  sums_.reserve(groups * sum_floats(plan));
  memset(sums_.data(), 0, groups * sum_floats(plan) * sizeof(float));
}

int64_t Wgc::scratch_floats() const {
  return kPanelFloats + (at_once_ ? plan_->k_group * plan_->wgc.filter_floats : 0);
}

int64_t Wgc::tasks(const ChannelLists& lists) const {
  return plan_->problem.groups * plan_->wgc.channel_blocks * lists.parts();
}

void Wgc::run(const ChannelLists& lists, int64_t group, int64_t task, float* scratch) const {
  const ConvProblem& problem = plan_->problem;
  const WgcPlan& wgc = plan_->wgc;
  const WgcKernel& kernel = *wgc.kernel;
  const int64_t part = task % lists.parts(), channel_task = task / lists.parts();
  const int64_t conv_group = channel_task / wgc.channel_blocks;
  const int64_t c = channel_task % wgc.channel_blocks * kernel.group;
  const auto block_at = [&](int64_t c) {
    return Block{conv_group * wgc.channels + c, std::min<int64_t>(kernel.group, wgc.channels - c)};
  };
  const Block block = block_at(c);
  const int64_t k = conv_group * plan_->k_group;
  const int64_t filter = wgc.filter_floats;
  const int64_t units = plan_->units(lists.images());
  const int64_t begin = lists.part_begin(part), end = lists.part_begin(part + 1);
  float* const sums =
      at_once_ ? scratch + kPanelFloats
               : sums_.data() + group * sum_floats(*plan_) + channel_task * plan_->k_group * filter;
  if (at_once_) memset(sums + begin * filter, 0, (end - begin) * filter * sizeof(float));
  for (int64_t index = 0; index < units; ++index) {
    const Rows rows = plan_->unit(lists.images(), index);
    Upcoming next = {};
    if (index + 1 < units) next = input_pixels(plan_->unit(lists.images(), index + 1), block);
    else if (c + kernel.group < wgc.channels)
      next = input_pixels(plan_->unit(lists.images(), 0), block_at(c + kernel.group));
    for (int64_t segment = 0; segment < wgc.segments; ++segment) {
      const int64_t panel = index * wgc.segments + segment;
      const List all = lists.list(panel);
      const auto add = [&](int64_t row_bytes, float* to) {
        kernel.run({all.values + k * wgc.capacity, all.offsets + k * wgc.capacity}, wgc.capacity,
                   lists.counts(panel) + k, lists.order(panel) + k, begin, end, scratch, row_bytes,
                   to, filter, next);
        next.count = 0;
      };
      if (wgc.window()) {
        gather_window(rows, block, scratch);
        add(plan_->window_columns() * wgc.pitch * 4, sums);
        continue;
      }
      for (int64_t r = 0; r < problem.r; ++r)
        for (int64_t s = 0; s < problem.s; ++s) {
          gather_tap(rows, segment, r, s, block, scratch);
          add(0, sums + (r * problem.s + s) * kernel.group);
        }
    }
  }
  if (at_once_)
    for (int64_t i = begin; i < end; ++i) write(channel_task, i, sums + i * filter);
}

// The rows of input under rows of the gradient; of several images, whole ones.
Upcoming Wgc::input_pixels(Rows rows, Block block) const {
  const ConvProblem& problem = plan_->problem;
  const auto input_row = [&](int64_t row, int64_t offset) {
    const int64_t h = row % plan_->p * problem.stride_h - problem.pad_h + offset;
    return row / plan_->p * problem.h + std::clamp<int64_t>(h, 0, problem.h - 1);
  };
  const int64_t first = input_row(rows.first, 0);
  const int64_t last = input_row(rows.first + rows.count - 1, (problem.r - 1) * problem.dil_h);
  const int64_t size = dtype_size(plan_->call.dtype);
  if (plan_->call.input_planes) {
    // Of several images the first.
    const int64_t image = first / problem.h, end = std::min(last + 1, (image + 1) * problem.h);
    const int64_t plane = problem.h * problem.w * size;
    return {static_cast<const char*>(plan_->call.input) + (image * problem.c + block.c) * plane +
                (first - image * problem.h) * problem.w * size,
            plane, block.channels, (end - first) * problem.w * size};
  }
  const int64_t pixels = (last + 1 - first) * problem.w;
  const char* from = static_cast<const char*>(plan_->call.input) +
                     (first * problem.w * problem.c + block.c) * size;
  const int64_t bytes = block.channels * size;
  // All channels: consecutive lines.
  if (block.channels == problem.c) return {from, 64, ceil_div(pixels * bytes, 64), 64};
  return {from, problem.c * size, pixels, bytes};
}

// Copies columns first + i * step, i < count, of row h of an image; zeros outside the image.
void Wgc::gather_row(int64_t image, int64_t h, int64_t first, int64_t step, int64_t count,
                     Block block, float* to) const {
  const ConvProblem& problem = plan_->problem;
  const int64_t pitch = plan_->wgc.pitch;
  int64_t begin = 0, end = 0;  // the columns inside the image
  if (h >= 0 && h < problem.h) {
    begin = first >= 0 ? 0 : std::min(count, ceil_div(-first, step));
    end = first >= problem.w ? 0 : std::min(count, ceil_div(problem.w - first, step));
    end = std::max(begin, end);
  }
  memset(to, 0, begin * pitch * sizeof(float));
  memset(to + end * pitch, 0, (count - end) * pitch * sizeof(float));
  if (begin == end) return;
  const DType dtype = plan_->call.dtype;
  if (plan_->call.input_planes) {
    const int64_t plane = problem.h * problem.w;
    const float* from = static_cast<const float*>(plan_->call.input) +
                        (image * problem.c + block.c) * plane + h * problem.w + first +
                        begin * step;
    to += begin * pitch;
    if (block.channels < pitch) memset(to, 0, (end - begin) * pitch * sizeof(float));
    plan_->kernels.transpose(from, plane, step, block.channels, end - begin, to, pitch);
    return;
  }
  const int64_t pixel = (image * problem.h + h) * problem.w + first + begin * step;
  const int64_t at = (pixel * problem.c + block.c) * dtype_size(dtype);
  plan_->kernels.gather_pixels(static_cast<const char*>(plan_->call.input) + at, dtype,
                               step * problem.c, end - begin, block.channels, to + begin * pitch,
                               pitch);
}

void Wgc::gather_window(Rows rows, Block block, float* panel) const {
  const ConvProblem& problem = plan_->problem;
  const int64_t columns = plan_->window_columns();
  for (int64_t row = rows.first; row < rows.first + rows.count;) {
    const int64_t image = row / plan_->p;
    const int64_t end = std::min(rows.first + rows.count, (image + 1) * plan_->p);
    const int64_t h = row % plan_->p * problem.stride_h - problem.pad_h;
    for (int64_t i = 0; i < plan_->window_rows(end - row); ++i) {
      gather_row(image, h + i, -problem.pad_w, 1, columns, block, panel);
      panel += columns * plan_->wgc.pitch;
    }
    row = end;
  }
}

void Wgc::gather_tap(Rows rows, int64_t segment, int64_t r, int64_t s, Block block,
                     float* panel) const {
  const ConvProblem& problem = plan_->problem;
  const int64_t column = segment * plan_->wgc.segment;
  const int64_t columns = std::min(plan_->wgc.segment, plan_->q - column);
  for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
    gather_row(row / plan_->p,
               row % plan_->p * problem.stride_h - problem.pad_h + r * problem.dil_h,
               column * problem.stride_w - problem.pad_w + s * problem.dil_w, problem.stride_w,
               columns, block, panel);
    panel += columns * plan_->wgc.pitch;
  }
}

void Wgc::finish(const TaskPool& pool) const {
  if (at_once_) return;
  const WgcPlan& wgc = plan_->wgc;
  const int64_t filters = plan_->problem.k * wgc.channel_blocks;
  parallel_tasks(pool, filters, [&](int64_t index, int) {
    float* sums = sums_.data() + index * wgc.filter_floats;
    for (int64_t group = 1; group < groups_; ++group) {
      const float* more = sums + group * sum_floats(*plan_);
      for (int64_t i = 0; i < wgc.filter_floats; ++i) sums[i] += more[i];
    }
    write(index / plan_->k_group, index % plan_->k_group, sums);
  });
}

void Wgc::write(int64_t channel_task, int64_t k, const float* sums) const {
  const ConvBackward& call = plan_->call;
  if (call.grad_weight_dtype == DType::kFloat32)
    write(static_cast<float*>(call.grad_weight), channel_task, k, sums,
          [](float sum) { return sum; });
  else write(static_cast<uint16_t*>(call.grad_weight), channel_task, k, sums, bfloat16_of_float);
}

template <class Storage, class Convert>
void Wgc::write(Storage* grad_weight, int64_t channel_task, int64_t k, const float* sums,
                Convert convert) const {
  const ConvProblem& problem = plan_->problem;
  const WgcPlan& wgc = plan_->wgc;
  const WeightStrides& strides = plan_->call.grad_weight_strides;
  const int64_t c = channel_task % wgc.channel_blocks * wgc.kernel->group;
  const int64_t channels = std::min<int64_t>(wgc.kernel->group, wgc.channels - c);
  k += channel_task / wgc.channel_blocks * plan_->k_group;
  // Sums are in the order [r][s][channel], with nothing between the columns if they are packed.
  const int64_t column = wgc.kernel->packed ? channels : wgc.kernel->group;
  const int64_t row = wgc.filter_floats / problem.r;
  // Contiguous: the taps of a channel lie side by side. Those that fill no vector are left to the loop.
  int64_t transposed = 0;
  if (std::is_same_v<Storage, float> && !wgc.kernel->packed && strides.c != 1 && strides.s == 1 &&
      strides.r == problem.s) {
    const int64_t taps = problem.r * problem.s, lanes = plan_->kernels.lanes;
    transposed = taps < lanes ? taps : taps / lanes * lanes;
    plan_->kernels.transpose(sums, column, 1, transposed, channels,
                             reinterpret_cast<float*>(grad_weight + k * strides.k + c * strides.c),
                             strides.c);
  }
  for (int64_t r = 0; r < problem.r; ++r)
    for (int64_t s = 0; s < problem.s; ++s) {
      if (r * problem.s + s < transposed) continue;
      const float* from = sums + r * row + s * column;
      Storage* to = grad_weight + k * strides.k + c * strides.c + r * strides.r + s * strides.s;
      if (strides.c == 1)
        for (int64_t i = 0; i < channels; ++i) to[i] = convert(from[i]);
      else
        for (int64_t i = 0; i < channels; ++i) to[i * strides.c] = convert(from[i]);
    }
}

}  // namespace sparsebwd
