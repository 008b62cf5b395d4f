// SPDX-License-Identifier: Apache-2.0
#include "depthwise_plan.h"

#include <algorithm>

#include "depthwise.h"
#include "sparsebwd/integers.h"

namespace sparsebwd {
namespace {

constexpr int64_t kLineFloats = 16;
// A tile of a cache line of channels is cut into bands of rows if it is larger than that; one of
// whole images takes more channels, up to the other size. Both in floats.
constexpr int64_t kLargestTile = 40 * 1024;
constexpr int64_t kPreferredTile = 12 * 1024;
// The same where only the gradient of the output is in a tile, with what it meets in the tensors.
constexpr int64_t kInPlaceTile = 64 * 1024;
constexpr int64_t kMostInPlaceChannels = 512;
constexpr int64_t kTallBand = 4;
constexpr int64_t kMostChannels = 64;
// The tile of one row, in floats: offsets in tiles have 32 bits, and each worker has a tile.
constexpr double kLargestRow = 1 << 22;
// Phases, and elements of the filters of an input channel, are listed.
constexpr int64_t kMostStride = 8;
constexpr int64_t kMostElements = 1 << 14;
// As many tasks are wanted, if there are images for them and their sums stay small.
constexpr int64_t kTasks = 32;
constexpr int64_t kMostSums = 512 * 1024;

// Vectors and tiles are an odd number of cache lines apart, so that they do not share sets of a cache.
int64_t odd_lines(int64_t floats) { return (ceil_div(floats, kLineFloats) | 1) * kLineFloats; }

}  // namespace

const char* depthwise_refusal(const ConvProblem& problem) {
  if (problem.groups != problem.c) return "it is not depthwise";
  if (problem.stride_h > kMostStride || problem.stride_w > kMostStride)
    return "a stride is above 8";
  if (problem.r > kMostElements || problem.s > kMostElements ||
      problem.k / problem.c > kMostElements / (problem.r * problem.s))
    return "the filters of an input channel have more than 16384 elements";
  const DepthwiseAxis rows(problem.h, problem.r, problem.stride_h, problem.pad_h, problem.dil_h);
  const DepthwiseAxis columns(problem.w, problem.s, problem.stride_w, problem.pad_w, problem.dil_w);
  const double width = static_cast<double>(columns.positions);
  const double floats =
      static_cast<double>(1 + rows.span()) * (width + static_cast<double>(columns.span())) +
      2.0 * static_cast<double>(rows.stride * columns.stride) * width;
  if (kLineFloats * floats > kLargestRow) return "rows are too long, or taps too far apart";
  return nullptr;
}

DepthwiseAxis::DepthwiseAxis(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                             int64_t dilation)
    : size(size), stride(stride), positions(ceil_div(size, stride)), phases(stride) {
  bool any = false;
  for (int64_t index = 0; index < kernel; ++index) {
    const int64_t row = index * dilation - padding;  // of the input, for the gradient's row 0
    const int64_t phase = (row % stride + stride) % stride;
    const int64_t shift = -(row - phase) / stride;
    phases[phase].push_back({index, shift});
    least = any ? std::min(least, shift) : shift;
    most = any ? std::max(most, shift) : shift;
    any = true;
  }
}

DepthwisePlan::DepthwisePlan(const ConvProblem& problem, int lanes, bool in_place)
    : lanes(lanes),
      in_place(in_place),
      rows(problem.h, problem.r, problem.stride_h, problem.pad_h, problem.dil_h),
      columns(problem.w, problem.s, problem.stride_w, problem.pad_w, problem.dil_w),
      multiple(problem.k / problem.c),
      taps(problem.r * problem.s) {
  cut_into_blocks(problem);
  list_chunks(problem);
  place_pixels(problem);
}

int64_t DepthwisePlan::scratch_floats() const { return odd_lines(g_floats() + 2 * x_floats()); }

void DepthwisePlan::cut_into_blocks(const ConvProblem& problem) {
  const int64_t g_columns = columns.positions + columns.span();
  const int64_t x_columns = rows.stride * columns.stride * columns.positions;
  auto channel_floats = [&](int64_t band) {
    return (band + rows.span()) * g_columns + 2 * band * x_columns;
  };
  // The most rows of `lines` cache lines of channels that fit, in bands of the same height.
  auto fitting_band = [&](int64_t lines, int64_t floats) {
    const int64_t room = floats / (lines * kLineFloats) - rows.span() * g_columns;
    const int64_t most = std::max<int64_t>(1, room / (g_columns + 2 * x_columns));
    return ceil_div(rows.positions, ceil_div(rows.positions, most));
  };
  int64_t lines;
  if (in_place) {
    // Wide pieces of pixels, for the memory's sake, but not so wide that there are few tasks, or that bands are
    // so low that much is gathered twice.
    const int64_t most =
        std::clamp(problem.n * ceil_div(problem.c, kLineFloats) / kTasks,
                   kMostChannels / kLineFloats, kMostInPlaceChannels / kLineFloats);
    const int64_t low = kLineFloats * channel_floats(std::min(rows.positions, kTallBand));
    lines = std::clamp<int64_t>(kInPlaceTile / low, 1, most);
    band = fitting_band(lines, kInPlaceTile);
  } else {
    band = fitting_band(1, kLargestTile);
    lines = std::clamp<int64_t>(kPreferredTile / (kLineFloats * channel_floats(band)), 1,
                                kMostChannels / kLineFloats);
  }
  blocks = ceil_div(problem.c, lines * kLineFloats);
  channels = round_up(ceil_div(problem.c, blocks), kLineFloats);
  blocks = ceil_div(problem.c, channels);
  const int64_t most_groups = std::max<int64_t>(1, kMostSums / (blocks * block_floats()));
  groups = std::max<int64_t>(1, std::min({ceil_div(kTasks, blocks), problem.n, most_groups}));

  g_pitch = g_columns * lanes;
  // One place more: of columns that no tap reaches.
  g_stride = odd_lines((band + rows.span()) * g_pitch + lanes);
  x_pitch = columns.positions * lanes;
  x_stride = odd_lines(rows.stride * columns.stride * band * x_pitch);
}

void DepthwisePlan::list_chunks(const ConvProblem& problem) {
  for (int64_t a = 0; a < rows.stride; ++a)
    for (int64_t b = 0; b < columns.stride; ++b) {
      const auto& down = rows.phases[a];
      const auto& across = columns.phases[b];
      DepthwiseChunk chunk = {};
      chunk.first_tap = static_cast<int64_t>(order.size());
      chunk.rows = rows.positions_of(a);
      chunk.columns = columns.positions_of(b);
      chunk.row_phase = a;
      chunk.column_phase = b;
      chunk.x_offset = (a * columns.stride + b) * band * x_pitch;
      chunk.first = true;
      const int64_t width = std::min<int64_t>(across.size(), kMostTaps);
      auto close = [&] {
        chunks.push_back(chunk);
        chunk.taps = 0;
        chunk.first_tap = static_cast<int64_t>(order.size());
        chunk.first = false;
      };
      // Whole rows of the filter at once, or parts of one.
      for (const DepthwiseTap& r : down)
        for (const DepthwiseTap& s : across) {
          const bool new_row = &s == across.data();
          if (chunk.taps > 0 && (new_row ? chunk.taps + width : chunk.taps + 1) > kMostTaps)
            close();
          chunk.least = chunk.taps ? std::min(chunk.least, r.shift) : r.shift;
          chunk.most = chunk.taps ? std::max(chunk.most, r.shift) : r.shift;
          chunk.offsets[chunk.taps++] = static_cast<int32_t>((r.shift - rows.least) * g_pitch +
                                                             (s.shift - columns.least) * lanes);
          order.push_back(r.index * problem.s + s.index);
        }
      close();
    }
}

void DepthwisePlan::place_pixels(const ConvProblem& problem) {
  const int64_t g_rows = band + rows.span(), q = problem.q();
  g_offsets.resize(g_rows * q);
  for (int64_t row = 0; row < g_rows; ++row)
    for (int64_t column = 0; column < q; ++column) {
      const int64_t place = (column - columns.least) * lanes;
      const bool reached = place >= 0 && place < g_pitch;
      g_offsets[row * q + column] =
          static_cast<int32_t>(reached ? row * g_pitch + place : g_rows * g_pitch);
    }
  x_offsets.resize(band * rows.stride * problem.w);
  for (int64_t row = 0; row < band * rows.stride; ++row)
    for (int64_t column = 0; column < problem.w; ++column) {
      const int64_t phase = row % rows.stride * columns.stride + column % columns.stride;
      x_offsets[row * problem.w + column] = static_cast<int32_t>(
          (phase * band + row / rows.stride) * x_pitch + column / columns.stride * lanes);
    }
}

}  // namespace sparsebwd
