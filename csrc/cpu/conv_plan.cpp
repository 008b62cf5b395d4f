// SPDX-License-Identifier: Apache-2.0
#include "conv_plan.h"

#include <algorithm>

namespace sparsebwd {
namespace {

// Panels of operands that the inner loops read at random: they should stay in L1, of which recent
// cores have 48 KB; those of weights together with the partial sums.
constexpr int64_t kPanelBytes = 40 * 1024, kWeightPanelBytes = 37 * 1024;
// Unless lists are so short that longer ones are worth more than that: densities, and what is taken below.
constexpr double kSparse = 0.125, kVerySparse = 0.03;
constexpr int64_t kSparsePanelBytes = 62 * 1024;
constexpr int64_t kUsualKBlock = 128;
constexpr int64_t kSampledPixels = 32, kSampledChannels = 8;  // from which they are told
// Partial sums of AGB for a band of rows: L2.
constexpr int64_t kBandBytes = 320 * 1024;
// Elements of the gradient whose lists stay in L2 until they are consumed; but enough pixels to
// make a panel of weights worth its fetching.
constexpr int64_t kChunkElements = 128 * 1024;
constexpr int64_t kChunkPixels = 512;
// Pixels whose pruned values are staged between pruning and listing.
constexpr int64_t kTilePixels = 32;
constexpr int64_t kPlaneTilePixels = 64;  // where they come from planes: whole cache lines of each
// Most partial sums of AGB for a row of input with its padding, of all images of a tile. A worker
// has one such row at least. Visit::dst counts bytes of it.
constexpr int64_t kMostRowBytes = int64_t{1} << 30;

// The share of the gradient that is not zero, or once it is pruned is expected not to be, in a sample: the
// same in every layout.
double sampled_density(const ConvBackward& call) {
  const ConvProblem& problem = call.problem;
  const int64_t pixels = problem.p() * problem.q(), elements = problem.n * pixels * problem.k;
  if (elements == 0) return 0.0;
  const float tau = call.prune ? call.prune->tau : 0.0f;
  const int64_t channels = std::min(kSampledChannels, problem.k);
  int64_t places[kSampledPixels * kSampledChannels];
  int64_t count = 0;
  for (uint64_t i = 0; i < kSampledPixels; ++i) {
    // Multiples of the golden ratio: spread, and over all channels.
    const auto at = static_cast<int64_t>(i * 0x9E3779B97F4A7C15u % static_cast<uint64_t>(elements));
    const int64_t k = std::min(at % problem.k, problem.k - channels), pixel = at / problem.k;
    for (int64_t j = k; j < k + channels; ++j) {
      const int64_t place = call.grad_output_planes
                                ? (pixel / pixels * problem.k + j) * pixels + pixel % pixels
                                : pixel * problem.k + j;
      // What is not in cache is waited for once, not every time.
      __builtin_prefetch(static_cast<const char*>(call.grad_output) +
                         place * dtype_size(call.dtype));
      places[count++] = place;
    }
  }
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const float g =
        call.dtype == DType::kFloat32
            ? static_cast<const float*>(call.grad_output)[places[i]]
            : float_of_bfloat16(static_cast<const uint16_t*>(call.grad_output)[places[i]]);
    const float magnitude = g < 0.0f ? -g : g;
    sum += magnitude < tau ? magnitude / tau : g != 0.0f;
  }
  return sum / static_cast<double>(count);
}

AgbPlan plan_agb(const ConvKernels& kernels, const ConvProblem& problem, double density) {
  AgbPlan plan;
  const int64_t panel_bytes = density < kVerySparse ? kMaxPanelBytes
                              : density < kSparse   ? kSparsePanelBytes
                                                    : kWeightPanelBytes;
  const int64_t most = density < kVerySparse ? kMaxKBlock : kUsualKBlock;
  const int64_t k_channels = problem.k / problem.groups;
  const auto fitting = [&](const AgbKernel& kernel) {
    const int64_t k =
        panel_bytes / (kernel.columns * kernel.group * 4) / kernels.lanes * kernels.lanes;
    return std::max<int64_t>(std::min(most, k), kernels.lanes);
  };
  const auto visits = [&](const AgbKernel& kernel) {  // of a pixel, for each row of the filter
    return ceil_div(plan.channels, kernel.group) * ceil_div(k_channels, fitting(kernel));
  };
  plan.channels = problem.c / problem.groups;
  plan.padded_w = problem.w + 2 * problem.pad_w;
  const int64_t image_pixels = problem.p() * problem.q();
  plan.images = std::min({problem.n, kSortedPixels / problem.q(), kChunkPixels / image_pixels});
  plan.images = std::max<int64_t>(1, plan.images);
  for (int i = 0; i < kernels.agb_count; ++i) {
    const AgbKernel& kernel = kernels.agb[i];
    if (kernel.columns > 1 && (kernel.columns != problem.s || problem.dil_w != 1)) continue;
    // Once a kernel with more columns fits, one with fewer is never better.
    if (plan.kernel && kernel.columns < plan.kernel->columns) break;
    // A window of more channels, with fewer output channels in its panel, only if it is for fewer visits
    // and leaves no more of its vectors empty.
    if (kernel.columns > 1 && kernel.columns == kernels.agb[i + 1].columns) {
      const AgbKernel& narrower = kernels.agb[i + 1];
      if (visits(kernel) >= visits(narrower) ||
          round_up(plan.channels, kernel.group) > round_up(plan.channels, narrower.group))
        continue;
    }
    plan.kernel = &kernel;
    if (kernel.group <= plan.channels) break;
  }
  const AgbKernel& kernel = *plan.kernel;
  plan.channel_blocks = ceil_div(plan.channels, kernel.group);
  plan.column_steps = problem.s / kernel.columns;
  plan.k_blocks = ceil_div(k_channels, fitting(kernel));
  plan.k_block = round_up(ceil_div(k_channels, plan.k_blocks), kernels.lanes);
  plan.k_blocks = ceil_div(k_channels, plan.k_block);
  plan.panel_floats = plan.k_block * kernel.columns * kernel.group;
  plan.capacity = problem.q() * std::min(plan.k_block, k_channels) + kernels.lanes;
  const int64_t fitting_rows = kBandBytes / (plan.images * plan.row_floats() * 4);
  plan.band_rows = std::max<int64_t>(1, std::min(fitting_rows, problem.h));
  return plan;
}

WgcPlan plan_wgc(const ConvKernels& kernels, const ConvProblem& problem, double density) {
  WgcPlan plan;
  const int64_t panel_bytes = density < kVerySparse ? kSparsePanelBytes : kPanelBytes;
  plan.channels = problem.c / problem.groups;
  const int64_t p = problem.p(), q = problem.q();
  const int64_t columns = (q - 1) * problem.stride_w + problem.s;
  int64_t rows_fit = 0, images_fit = 0, columns_fit = q;
  for (int i = 0; i < kernels.wgc_count; ++i) {
    const WgcKernel& kernel = kernels.wgc[i];
    plan.pitch = kernel.packed ? plan.channels : kernel.group;
    if (kernel.rows > 1) {
      const bool all_columns =
          kernel.packed ? problem.s * plan.channels <= kernel.group : problem.s == kernel.columns;
      if (problem.r != kernel.rows || !all_columns || problem.dil_h != 1 || problem.dil_w != 1)
        continue;
      const int64_t row_bytes = columns * plan.pitch * 4;
      if (problem.r * row_bytes >= kMaxPanelBytes) continue;
      const int64_t rows = panel_bytes / row_bytes;
      rows_fit = rows < problem.r ? 1 : (rows - problem.r) / problem.stride_h + 1;
      images_fit = panel_bytes / (((p - 1) * problem.stride_h + problem.r) * row_bytes);
      plan.kernel = &kernel;
      break;
    }
    // The widest kernel, unless a narrower one leaves less of its vectors empty.
    if (kernel.group > 4 * kernels.lanes &&
        round_up(plan.channels, kernel.group) > round_up(plan.channels, 4 * kernels.lanes))
      continue;
    const int64_t pixels = panel_bytes / (plan.pitch * 4);
    columns_fit = std::min(q, pixels);
    rows_fit = std::max<int64_t>(1, pixels / q);
    images_fit = pixels / (p * q);
    plan.kernel = &kernel;
    if (kernel.group <= plan.channels) break;
  }
  const WgcKernel& kernel = *plan.kernel;
  plan.channel_blocks = kernel.packed ? 1 : ceil_div(plan.channels, kernel.group);
  plan.filter_floats = problem.r * (kernel.packed ? 1 : problem.s) * kernel.group;
  plan.images = std::max<int64_t>(1, std::min(images_fit, problem.n));
  rows_fit = std::min(rows_fit, p);
  plan.units_per_block = images_fit >= 1 ? 1 : ceil_div(p, rows_fit);
  plan.unit_rows = images_fit >= 1 ? plan.images * p : ceil_div(p, plan.units_per_block);
  plan.units_per_block = images_fit >= 1 ? 1 : ceil_div(p, plan.unit_rows);
  plan.segments = ceil_div(q, columns_fit);
  plan.segment = ceil_div(q, plan.segments);
  plan.segments = ceil_div(q, plan.segment);
  plan.capacity = round_up(plan.unit_rows * plan.segment, kernels.lanes) + kernels.lanes;
  return plan;
}

}  // namespace

// Offsets into panels have 16 bits; plan_agb() and plan_wgc() cut panels so that they suffice, and with
// them a list of WGC has fewer than 2^16 entries, one of AGB at most kMaxKBlock.
const char* conv_refusal(const ConvKernels& kernels, const ConvProblem& problem) {
  // ChannelLists::order
  if (problem.k / problem.groups > UINT16_MAX) return "more than 65535 output channels a group";
  for (const double density : {1.0, kSparse / 2, 0.0}) {
    const AgbPlan agb = plan_agb(kernels, problem, density);
    if (agb.images * agb.row_floats() * 4 > kMostRowBytes)
      return "rows of the input, with their padding, are too long";
    // Visit::start, of the last entry of a tile
    if (((agb.images - 1) * problem.p() + 1) * agb.capacity > UINT32_MAX)
      return "rows of the output are too long";
  }
  return nullptr;
}

ConvPlan::ConvPlan(const ConvKernels& kernels, const PruneKernels& prune_kernels,
                   const ConvBackward& call)
    : kernels(kernels),
      prune_kernels(prune_kernels),
      call(call),
      problem(call.problem),
      p(problem.p()),
      q(problem.q()),
      k_group(problem.k / problem.groups),
      density(sampled_density(call)),
      agb(plan_agb(kernels, problem, density)),
      wgc(plan_wgc(kernels, problem, density)) {}

int64_t ConvPlan::tile_rows() const {
  return std::max<int64_t>(1, (call.grad_output_planes ? kPlaneTilePixels : kTilePixels) / q);
}

int64_t ConvPlan::units(Images images) const {
  return ceil_div(images.count(), wgc.images) * wgc.units_per_block;
}

Rows ConvPlan::unit(Images images, int64_t index) const {
  const int64_t first_image = images.begin + index / wgc.units_per_block * wgc.images;
  const int64_t end = std::min(first_image + wgc.images, images.end) * p;
  const int64_t row = first_image * p + index % wgc.units_per_block * wgc.unit_rows;
  return {row, std::min(wgc.unit_rows, end - row)};
}

int64_t ConvPlan::chunk_images() const {
  const int64_t pixels = std::max(kChunkPixels, kChunkElements / problem.k);
  return round_up(std::max({int64_t{1}, pixels / (p * q), agb.images}), wgc.images);
}

}  // namespace sparsebwd
