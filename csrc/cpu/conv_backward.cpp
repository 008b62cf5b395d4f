// SPDX-License-Identifier: Apache-2.0
#include "conv_backward.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>

namespace sparsebwd {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Panels of operands that the inner loops read at random: they have to stay in L1.
constexpr int64_t kPanelBytes = 40 * 1024;
// Panels of weights share L1 with the partial sums.
constexpr int64_t kWeightPanelBytes = 37 * 1024;
// Partial sums of AGB for a band of rows: L2.
constexpr int64_t kBandBytes = 320 * 1024;
// Most output channels of a panel of weights.
constexpr int64_t kMaxKBlock = 512;
// Pixels whose lists are sorted by length together.
constexpr int64_t kSortedPixels = 64;
// Elements of the gradient, for each thread, whose lists are built before they are consumed, so that
// the lists stay in L2; but enough pixels to make a panel of weights worth its fetching.
constexpr int64_t kChunkElements = 128 * 1024;
constexpr int64_t kChunkPixels = 512;
// Pixels whose pruned values are staged between pruning and listing.
constexpr int64_t kTilePixels = 32;

// Memory that is kept from call to call: fresh pages cost more than a sparse convolution.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  template <class T>
  T* get(int64_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 64, 64);
    if (bytes > bytes_) {
      free(data_);
      bytes_ = 0;
      data_ = aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Workspace {
  Buffer pixel_values, pixel_offsets, pixel_counts;
  Buffer channel_values, channel_offsets, channel_counts;
  Buffer visits, visit_counts, channel_order;
  Buffer operand_offsets, weight_panels, weight_sums, scratch, nonzeros;
};

// ---- plans: how a problem is cut, a function of the problem and the instruction set only

struct AgbPlan {
  const AgbKernel* kernel = nullptr;
  int64_t channels;           // input channels of a convolution group
  int64_t channel_blocks;     // of kernel->group
  int64_t column_steps;       // columns of the filter / those of the inner kernel
  int64_t k_block, k_blocks;  // output channels of a panel; panels of a convolution group
  int64_t panel_floats;
  int64_t capacity;  // entries of the list of one row and k-block
  int64_t padded_w;  // columns of a row of partial sums
  int64_t band_rows;  // rows of grad_input whose partial sums are held at a time, per image
  int64_t images;    // of a tile: the same row of so many images

  uint32_t step() const { return static_cast<uint32_t>(kernel->columns * kernel->group * 4); }
  int64_t row_floats() const { return padded_w * kernel->group; }
};

AgbPlan plan_agb(const ConvKernels& kernels, const ConvProblem& problem) {
  AgbPlan plan;
  plan.channels = problem.c / problem.groups;
  plan.padded_w = std::max(problem.w + 2 * problem.pad_w,
                           (problem.q() - 1) * problem.stride_w + (problem.s - 1) * problem.dil_w + 1);
  plan.images = std::max<int64_t>(1, std::min(problem.n, kSortedPixels / problem.q()));
  for (int i = 0; i < kernels.agb_count; ++i) {
    const AgbKernel& kernel = kernels.agb[i];
    if (kernel.columns > 1 && (kernel.columns != problem.s || problem.dil_w != 1)) continue;
    // Once a kernel with more columns fits, one with fewer is never better.
    if (plan.kernel && kernel.columns < plan.kernel->columns) break;
    plan.kernel = &kernel;
    if (kernel.group <= plan.channels) break;
  }
  const AgbKernel& kernel = *plan.kernel;
  const int64_t k_channels = problem.k / problem.groups;
  plan.channel_blocks = ceil_div(plan.channels, kernel.group);
  plan.column_steps = problem.s / kernel.columns;
  const int64_t fitting =
      std::min(kMaxKBlock, kWeightPanelBytes / plan.step() / kernels.lanes * kernels.lanes);
  plan.k_blocks = ceil_div(k_channels, std::max<int64_t>(fitting, kernels.lanes));
  plan.k_block = round_up(ceil_div(k_channels, plan.k_blocks), kernels.lanes);
  plan.k_blocks = ceil_div(k_channels, plan.k_block);
  plan.panel_floats = plan.k_block * kernel.columns * kernel.group;
  plan.capacity = problem.q() * std::min(plan.k_block, k_channels) + kernels.lanes;
  const int64_t fitting_rows = kBandBytes / (plan.images * plan.row_floats() * 4);
  plan.band_rows = std::max<int64_t>(1, std::min(fitting_rows, problem.h));
  return plan;
}

// The pixels of the gradient are cut into units of whole rows, and a unit into segments; the pixels
// of one segment of a unit are a panel.
struct WgcPlan {
  const WgcKernel* kernel = nullptr;
  int64_t channels;
  int64_t channel_blocks;
  int64_t images;        // whole images of a unit, if > 1 or if the unit is one image
  int64_t unit_rows;
  int64_t units_per_block;  // a block: `images` images
  int64_t segment;       // columns of a segment
  int64_t segments;      // of a row
  int64_t capacity;      // entries of the list of a channel and panel
};

// Rows of the input under `rows` rows of the gradient, for a window kernel.
int64_t window_rows(const ConvProblem& problem, int64_t rows) {
  return (rows - 1) * problem.stride_h + problem.r;
}

int64_t window_columns(const ConvProblem& problem) {
  return (problem.q() - 1) * problem.stride_w + problem.s;
}

WgcPlan plan_wgc(const ConvKernels& kernels, const ConvProblem& problem) {
  WgcPlan plan;
  plan.channels = problem.c / problem.groups;
  const int64_t p = problem.p(), q = problem.q();
  int64_t rows_fit = 0, images_fit = 0, columns_fit = q;
  for (int i = 0; i < kernels.wgc_count; ++i) {
    const WgcKernel& kernel = kernels.wgc[i];
    const int64_t pixel_bytes = kernel.group * 4;
    if (kernel.window > 1) {
      if (problem.r != kernel.window || problem.s != kernel.window || problem.dil_h != 1 ||
          problem.dil_w != 1)
        continue;
      const int64_t row_bytes = window_columns(problem) * pixel_bytes;
      if (window_rows(problem, 1) * row_bytes >= kMaxPanelBytes) continue;
      const int64_t rows = kPanelBytes / row_bytes;
      rows_fit = rows < problem.r ? 1 : (rows - problem.r) / problem.stride_h + 1;
      images_fit = kPanelBytes / (window_rows(problem, p) * row_bytes);
      plan.kernel = &kernel;
      break;
    }
    const int64_t pixels = kPanelBytes / pixel_bytes;
    columns_fit = std::min(q, pixels);
    rows_fit = std::max<int64_t>(1, pixels / q);
    images_fit = pixels / (p * q);
    plan.kernel = &kernel;
    if (kernel.group <= plan.channels) break;
  }
  plan.channel_blocks = ceil_div(plan.channels, plan.kernel->group);
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

// ---- one call

class Backward {
 public:
  Backward(const ConvKernels& kernels, const PruneKernels& prune_kernels, const TaskPool& pool,
           const ConvBackward& call)
      : kernels_(kernels),
        prune_kernels_(prune_kernels),
        pool_(pool),
        call_(call),
        problem_(call.problem),
        p_(problem_.p()),
        q_(problem_.q()),
        k_group_(problem_.k / problem_.groups),
        agb_(plan_agb(kernels, problem_)),
        wgc_(plan_wgc(kernels, problem_)) {}

  int64_t run() {
    static thread_local Workspace workspace;
    workspace_ = &workspace;
    prepare();
    int64_t nonzeros = 0;
    for (image_begin_ = 0; image_begin_ < problem_.n; image_begin_ = image_end_) {
      image_end_ = std::min(problem_.n, image_begin_ + chunk_images_);
      nonzeros += build_lists();
      if (call_.grad_input) run_agb();
      if (call_.grad_weight) run_wgc();
    }
    if (call_.grad_weight) write_grad_weight();
    return nonzeros;
  }

 private:
  bool staged() const { return call_.prune || call_.pruned || call_.dtype != DType::kFloat32; }

  void prepare() {
    const int64_t image_pixels = std::max<int64_t>(1, p_ * q_);
    const int64_t pixels = std::max(kChunkPixels, kChunkElements * pool_.threads / problem_.k);
    // A panel never crosses the end of a chunk, so that results do not depend on it.
    chunk_images_ = round_up(std::max({int64_t{1}, pixels / image_pixels, agb_.images}),
                             wgc_.images);
    chunk_images_ = std::min(chunk_images_, round_up(problem_.n, wgc_.images));
    const int64_t units = ceil_div(chunk_images_, wgc_.images) * wgc_.units_per_block;
    nonzeros_ = workspace_->nonzeros.get<int64_t>(units);
    int64_t scratch_floats = staged() ? tile_pixels() * problem_.k : 0;
    if (call_.grad_input) {
      const int64_t lists = chunk_images_ * p_ * problem_.groups * agb_.k_blocks;
      pixel_lists_ = {workspace_->pixel_values.get<float>(lists * agb_.capacity),
                      workspace_->pixel_offsets.get<uint16_t>(lists * agb_.capacity)};
      pixel_counts_ = workspace_->pixel_counts.get<uint16_t>(lists * q_);
      const int64_t tiles = max_tiles() * problem_.groups * agb_.k_blocks;
      visits_ = workspace_->visits.get<Visit>(tiles * agb_.images * q_);
      visit_counts_ = workspace_->visit_counts.get<int64_t>(tiles);
      scratch_floats = std::max(scratch_floats, agb_.images * image_floats());
      pack_weights();
    }
    if (call_.grad_weight) {
      const int64_t lists = units * wgc_.segments * problem_.k;
      channel_lists_ = {workspace_->channel_values.get<float>(lists * wgc_.capacity),
                        workspace_->channel_offsets.get<uint16_t>(lists * wgc_.capacity)};
      channel_counts_ = workspace_->channel_counts.get<uint16_t>(lists);
      channel_order_ = workspace_->channel_order.get<uint16_t>(lists);
      scratch_floats = std::max(scratch_floats, kMaxPanelBytes / 4);
      fill_operand_offsets();
      const int64_t channel_tasks = problem_.groups * wgc_.channel_blocks;
      parts_ = std::min(k_group_, ceil_div(2 * pool_.threads, channel_tasks));
      const int64_t sums = problem_.groups * wgc_.channel_blocks * k_group_ * weight_sum_stride();
      weight_sums_ = workspace_->weight_sums.get<float>(sums);
      memset(weight_sums_, 0, sums * sizeof(float));
    }
    scratch_stride_ = round_up(scratch_floats + 1024, 16);
    scratch_ = workspace_->scratch.get<float>(scratch_stride_ * pool_.threads);
  }

  float* scratch(int worker) const { return scratch_ + worker * scratch_stride_; }

  // ---- lists

  int64_t tile_rows() const { return std::max<int64_t>(1, kTilePixels / q_); }
  int64_t tile_pixels() const { return tile_rows() * q_; }

  struct Unit {
    int64_t row, rows;  // rows of the gradient, numbered n * p + p
  };

  int64_t unit_count() const {
    return ceil_div(image_end_ - image_begin_, wgc_.images) * wgc_.units_per_block;
  }

  Unit unit(int64_t index) const {
    const int64_t block = index / wgc_.units_per_block, part = index % wgc_.units_per_block;
    const int64_t first_image = image_begin_ + block * wgc_.images;
    const int64_t block_end = std::min(first_image + wgc_.images, image_end_) * p_;
    const int64_t row = first_image * p_ + part * wgc_.unit_rows;
    return {row, std::min(wgc_.unit_rows, block_end - row)};
  }

  // Index of the AGB list of a row and a k-block (numbered through the convolution's groups).
  int64_t pixel_list(int64_t row, int64_t k_block) const {
    return k_block * chunk_images_ * p_ + (row - image_begin_ * p_);
  }

  int64_t build_lists() {
    const int64_t units = unit_count();
    parallel_tasks(pool_, units, [&](int64_t index, int worker) {
      nonzeros_[index] = list_unit(index, scratch(worker));
    });
    int64_t total = 0;
    for (int64_t index = 0; index < units; ++index) total += nonzeros_[index];
    return total;
  }

  int64_t list_unit(int64_t index, float* tile) {
    const Unit u = unit(index);
    int64_t found = 0;
    if (call_.grad_weight)
      memset(channel_counts_ + index * wgc_.segments * problem_.k, 0,
             wgc_.segments * problem_.k * sizeof(uint16_t));
    for (int64_t row = u.row; row < u.row + u.rows; row += tile_rows()) {
      const int64_t rows = std::min(tile_rows(), u.row + u.rows - row);
      const int64_t element = row * q_ * problem_.k;
      const char* source = static_cast<const char*>(call_.grad_output) + element * dtype_size(call_.dtype);
      const float* g;
      if (staged()) {
        char* out = call_.pruned
                        ? static_cast<char*>(call_.pruned) + element * dtype_size(call_.dtype)
                        : nullptr;
        found += stage(source, out, row, rows, tile);
        g = tile;
      } else {
        g = reinterpret_cast<const float*>(source);
      }
      if (call_.grad_input) list_rows_by_pixel(g, row, rows);
      if (call_.grad_weight) list_rows_by_channel(g, index, row - u.row, rows);
    }
    if (call_.grad_weight) sort_channels(index);
    if (!staged()) found = count_listed(index, u);
    return found;
  }

  int64_t stage(const void* source, void* out, int64_t row, int64_t rows, float* tile) const {
    if (!call_.prune)
      return prune_kernels_.load_pixels_nhwc(source, call_.dtype, problem_.k, out, tile, problem_.k,
                                             rows * q_, problem_.k);
    int64_t found = 0;
    const int64_t row_bytes = q_ * problem_.k * dtype_size(call_.dtype);
    for (int64_t i = 0; i < rows; ++i)
      found += prune_kernels_.prune_pixels_nhwc(
          static_cast<const char*>(source) + i * row_bytes, call_.dtype, problem_.k,
          out ? static_cast<char*>(out) + i * row_bytes : nullptr, tile + i * q_ * problem_.k,
          problem_.k, static_cast<uint32_t>((row + i) / p_), static_cast<uint32_t>((row + i) % p_),
          0, q_, problem_.k, *call_.prune);
    return found;
  }

  void list_rows_by_pixel(const float* g, int64_t row, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t block = 0; block < problem_.groups * agb_.k_blocks; ++block) {
        const int64_t k = k_begin(block);
        const int64_t list = pixel_list(row + i, block);
        kernels_.list_by_pixel(g + i * q_ * problem_.k + k, problem_.k, q_, k_size(block),
                               agb_.step(),
                               {pixel_lists_.values + list * agb_.capacity,
                                pixel_lists_.offsets + list * agb_.capacity},
                               pixel_counts_ + list * q_);
      }
  }

  void list_rows_by_channel(const float* g, int64_t unit_index, int64_t row, int64_t rows) {
    for (int64_t segment = 0; segment < wgc_.segments; ++segment) {
      const int64_t column = segment * wgc_.segment;
      // One segment: its pixels are consecutive through all rows. More than one: one row a tile.
      const int64_t pixels =
          wgc_.segments == 1 ? rows * q_ : std::min(wgc_.segment, q_ - column);
      const int64_t panel = unit_index * wgc_.segments + segment;
      kernels_.list_by_channel(g + column * problem_.k, problem_.k, pixels, problem_.k,
                               operand_offsets_ + (wgc_.segments == 1 ? row * q_ : 0),
                               channel_list(panel), wgc_.capacity,
                               channel_counts_ + panel * problem_.k);
    }
  }

  List channel_list(int64_t panel) const {
    const int64_t at = panel * problem_.k * wgc_.capacity;
    return {channel_lists_.values + at, channel_lists_.offsets + at};
  }

  int64_t count_listed(int64_t unit_index, Unit u) const {
    int64_t found = 0;
    if (call_.grad_weight) {
      const uint16_t* counts = channel_counts_ + unit_index * wgc_.segments * problem_.k;
      for (int64_t i = 0; i < wgc_.segments * problem_.k; ++i) found += counts[i];
    } else if (call_.grad_input) {
      for (int64_t block = 0; block < problem_.groups * agb_.k_blocks; ++block) {
        const uint16_t* counts = pixel_counts_ + pixel_list(u.row, block) * q_;
        for (int64_t i = 0; i < u.rows * q_; ++i) found += counts[i];
      }
    }
    return found;
  }

  // ---- AGB

  // First output channel of a k-block, and its number of channels.
  int64_t k_begin(int64_t block) const {
    return block / agb_.k_blocks * k_group_ + block % agb_.k_blocks * agb_.k_block;
  }
  int64_t k_size(int64_t block) const {
    return std::min(agb_.k_block, k_group_ - block % agb_.k_blocks * agb_.k_block);
  }

  int64_t weight_panel(int64_t k_block, int64_t channel_block, int64_t r,
                       int64_t column_step) const {
    const int64_t group = k_block / agb_.k_blocks;
    const int64_t row = (group * agb_.channel_blocks + channel_block) * problem_.r + r;
    return (row * agb_.column_steps + column_step) * agb_.k_blocks + k_block % agb_.k_blocks;
  }

  // Panels of [k][tap][channel], zero behind the last channel of a group.
  void pack_weights() {
    const int64_t k_blocks = problem_.groups * agb_.k_blocks;
    weight_panels_ = workspace_->weight_panels.get<float>(k_blocks * agb_.channel_blocks *
                                                          problem_.r * agb_.column_steps *
                                                          agb_.panel_floats);
    const AgbKernel& kernel = *agb_.kernel;
    const WeightStrides& strides = call_.weight_strides;
    parallel_tasks(pool_, k_blocks * agb_.channel_blocks, [&](int64_t task, int) {
      const int64_t block = task / agb_.channel_blocks, channel_block = task % agb_.channel_blocks;
      const int64_t c_begin = channel_block * kernel.group;
      const int64_t channels = std::min<int64_t>(kernel.group, agb_.channels - c_begin);
      for (int64_t k = 0; k < k_size(block); ++k)
        for (int64_t r = 0; r < problem_.r; ++r)
          for (int64_t s = 0; s < problem_.s; ++s) {
            const int64_t panel = weight_panel(block, channel_block, r, s / kernel.columns);
            float* to = weight_panels_ + panel * agb_.panel_floats +
                        (k * kernel.columns + s % kernel.columns) * kernel.group;
            const int64_t from = (k_begin(block) + k) * strides.k + c_begin * strides.c +
                                 r * strides.r + s * strides.s;
            load_weights(from, channels, to);
            for (int64_t c = channels; c < kernel.group; ++c) to[c] = 0.0f;
          }
    });
  }

  void load_weights(int64_t from, int64_t channels, float* to) const {
    const int64_t stride = call_.weight_strides.c;
    if (call_.weight_dtype == DType::kFloat32) {
      const float* w = static_cast<const float*>(call_.weight) + from;
      if (stride == 1)
        memcpy(to, w, channels * sizeof(float));
      else
        for (int64_t c = 0; c < channels; ++c) to[c] = w[c * stride];
    } else {
      const uint16_t* w = static_cast<const uint16_t*>(call_.weight) + from;
      for (int64_t c = 0; c < channels; ++c) to[c] = float_of_bfloat16(w[c * stride]);
    }
  }

  // A tile: row p of the gradient in `images` neighbouring images.
  int64_t max_tiles() const { return ceil_div(chunk_images_, agb_.images) * p_; }
  int64_t tile_count() const { return ceil_div(image_end_ - image_begin_, agb_.images) * p_; }

  struct Images {
    int64_t first, count;
  };
  Images image_group(int64_t index) const {
    const int64_t first = image_begin_ + index * agb_.images;
    return {first, std::min(agb_.images, image_end_ - first)};
  }

  // Sorts the pixels of every tile and k-block by the number of their entries.
  void sort_tiles() {
    parallel_tasks(pool_, tile_count(), [&](int64_t tile, int) {
      for (int64_t block = 0; block < problem_.groups * agb_.k_blocks; ++block)
        sort_tile(tile, block);
    });
  }

  void sort_tile(int64_t tile, int64_t block) {
    const Images images = image_group(tile / p_);
    const int64_t index = block * max_tiles() + tile;
    Visit* const visits = visits_ + index * agb_.images * q_;
    uint32_t position[kMaxKBlock + 1] = {};
    for (int64_t i = 0; i < images.count; ++i) {
      const uint16_t* counts = pixel_counts_ + pixel_list((images.first + i) * p_ + tile % p_, block) * q_;
      for (int64_t q = 0; q < q_; ++q) ++position[counts[q]];
    }
    // Longest first; pixels without entries last, and left out.
    uint32_t sum = 0;
    for (int64_t n = kMaxKBlock; n >= 0; --n) {
      const uint32_t here = position[n];
      position[n] = sum;
      sum += here;
    }
    visit_counts_[index] = position[0];
    const uint32_t image_bytes = static_cast<uint32_t>(image_floats() * 4);
    const uint32_t pixel_bytes = static_cast<uint32_t>(problem_.stride_w * agb_.kernel->group * 4);
    for (int64_t i = 0; i < images.count; ++i) {
      const int64_t list = pixel_list((images.first + i) * p_ + tile % p_, block);
      const uint16_t* counts = pixel_counts_ + list * q_;
      uint32_t start = static_cast<uint32_t>(i * p_ * agb_.capacity);
      for (int64_t q = 0; q < q_; ++q) {
        if (counts[q])
          visits[position[counts[q]]++] = {start, counts[q], static_cast<uint32_t>(i) * image_bytes +
                                                                 static_cast<uint32_t>(q) * pixel_bytes};
        start += counts[q];
      }
    }
  }

  // Partial sums of one image's part of a band.
  int64_t image_floats() const { return agb_.band_rows * agb_.row_floats(); }

  void run_agb() {
    sort_tiles();
    const int64_t image_groups = ceil_div(image_end_ - image_begin_, agb_.images);
    const int64_t bands = ceil_div(problem_.h, agb_.band_rows);
    const int64_t channel_tasks = problem_.groups * agb_.channel_blocks;
    parallel_tasks(pool_, image_groups * bands * channel_tasks, [&](int64_t task, int worker) {
      const int64_t band = task / channel_tasks;
      const int64_t first = band % bands * agb_.band_rows;
      agb_band(band / bands, first, std::min(first + agb_.band_rows, problem_.h), task % channel_tasks,
               scratch(worker));
      kernels_.finish_stores();
    });
  }

  // Rows [first, last) of grad_input in a group of images, for one block of input channels.
  void agb_band(int64_t image_group_index, int64_t first, int64_t last, int64_t channel_task,
                float* sums) const {
    const Images images = image_group(image_group_index);
    const int64_t group_index = channel_task / agb_.channel_blocks;
    const int64_t channel_block = channel_task % agb_.channel_blocks;
    const int64_t group = agb_.kernel->group;
    memset(sums, 0, images.count * image_floats() * sizeof(float));
    for (int64_t r = 0; r < problem_.r; ++r)
      for (int64_t column_step = 0; column_step < agb_.column_steps; ++column_step)
        for (int64_t block = 0; block < agb_.k_blocks; ++block) {
          const int64_t k_block = group_index * agb_.k_blocks + block;
          const float* panel =
              weight_panels_ +
              weight_panel(k_block, channel_block, r, column_step) * agb_.panel_floats;
          float* to = sums + column_step * problem_.dil_w * group;
          for (int64_t h = first; h < last; ++h) {
            const int64_t offset = h + problem_.pad_h - r * problem_.dil_h;
            if (offset >= 0 && offset % problem_.stride_h == 0 && offset / problem_.stride_h < p_)
              agb_tile(image_group_index, offset / problem_.stride_h, k_block, panel,
                       to + (h - first) * agb_.row_floats());
          }
        }
    const int64_t c = group_index * agb_.channels + channel_block * group;
    const int64_t channels = std::min(group, agb_.channels - channel_block * group);
    for (int64_t i = 0; i < images.count; ++i)
      for (int64_t h = first; h < last; ++h)
        kernels_.scatter_pixels(
            sums + i * image_floats() + (h - first) * agb_.row_floats() + problem_.pad_w * group,
            group, problem_.w, channels,
            static_cast<char*>(call_.grad_input) +
                (((images.first + i) * problem_.h + h) * problem_.w * problem_.c + c) *
                    dtype_size(call_.dtype),
            call_.dtype, problem_.c);
  }

  // What row p of a group of images contributes through one panel of weights.
  void agb_tile(int64_t image_group_index, int64_t p, int64_t k_block, const float* panel,
                float* to) const {
    const int64_t list = pixel_list(image_group(image_group_index).first * p_ + p, k_block);
    const int64_t tile = k_block * max_tiles() + image_group_index * p_ + p;
    agb_.kernel->run({pixel_lists_.values + list * agb_.capacity,
                      pixel_lists_.offsets + list * agb_.capacity},
                     visits_ + tile * agb_.images * q_, visit_counts_[tile], panel, to);
  }

  // ---- WGC

  int64_t weight_sum_stride() const { return problem_.r * problem_.s * wgc_.kernel->group; }

  bool window() const { return wgc_.kernel->window > 1; }

  int64_t window_row_floats() const { return window_columns(problem_) * wgc_.kernel->group; }

  // Byte offset in the panel of the operand of every pixel of a unit.
  void fill_operand_offsets() {
    const int64_t pixels = wgc_.segments == 1 ? wgc_.unit_rows * q_ : wgc_.segment;
    operand_offsets_ = workspace_->operand_offsets.get<uint16_t>(round_up(pixels, kernels_.lanes) +
                                                                 kernels_.lanes);
    for (int64_t i = 0; i < pixels; ++i) {
      int64_t at = i * wgc_.kernel->group;
      if (window()) {
        const int64_t row = i / q_, image = row / p_;
        const int64_t panel_row = image * window_rows(problem_, p_) + row % p_ * problem_.stride_h;
        at = panel_row * window_row_floats() + i % q_ * problem_.stride_w * wgc_.kernel->group;
      }
      operand_offsets_[i] = static_cast<uint16_t>(at * 4);
    }
  }

  // Output channels of a group are split into parts, a task each, if there are too few blocks of
  // input channels to keep all threads busy.
  int64_t part_begin(int64_t part) const { return k_group_ * part / parts_; }

  // Sorts the output channels of every group and part by the length of their lists in a panel.
  void sort_channels(int64_t unit_index) {
    for (int64_t i = 0; i < wgc_.segments * problem_.groups; ++i) {
      const int64_t first = unit_index * wgc_.segments * problem_.k + i * k_group_;
      const uint16_t* counts = channel_counts_ + first;
      uint16_t* order = channel_order_ + first;
      for (int64_t part = 0; part < parts_; ++part)
        sort_part(counts, order, part_begin(part), part_begin(part + 1));
    }
  }

  // Counting sort, in classes: the inner loop only has to guess right most of the time.
  static void sort_part(const uint16_t* counts, uint16_t* order, int64_t begin, int64_t end) {
    constexpr int kClasses = 256;
    uint16_t position[kClasses] = {};
    const auto class_of = [counts](int64_t k) {
      return std::min<int64_t>(counts[k], kClasses - 1);
    };
    for (int64_t k = begin; k < end; ++k) ++position[class_of(k)];
    uint16_t sum = 0;
    for (int i = 0; i < kClasses; ++i) {
      const uint16_t here = position[i];
      position[i] = sum;
      sum = static_cast<uint16_t>(sum + here);
    }
    for (int64_t k = begin; k < end; ++k)
      order[begin + position[class_of(k)]++] = static_cast<uint16_t>(k);
  }

  void run_wgc() {
    const int64_t channel_tasks = problem_.groups * wgc_.channel_blocks;
    parallel_tasks(pool_, channel_tasks * parts_, [&](int64_t task, int worker) {
      wgc_block(task / parts_, task % parts_, scratch(worker));
    });
  }

  // Adds what this chunk contributes to grad_weight, for one block of input channels and one part of
  // its group's output channels.
  void wgc_block(int64_t channel_task, int64_t part, float* panel) const {
    const int64_t group_index = channel_task / wgc_.channel_blocks;
    const int64_t c = group_index * wgc_.channels + channel_task % wgc_.channel_blocks * wgc_.kernel->group;
    const int64_t channels = std::min<int64_t>(wgc_.kernel->group, (group_index + 1) * wgc_.channels - c);
    const int64_t k = group_index * k_group_;
    float* sums = weight_sums_ + channel_task * k_group_ * weight_sum_stride();
    const int64_t units = unit_count();
    for (int64_t index = 0; index < units; ++index) {
      const Unit u = unit(index);
      for (int64_t segment = 0; segment < wgc_.segments; ++segment) {
        const int64_t panel_index = index * wgc_.segments + segment;
        List lists = channel_list(panel_index);
        lists.values += k * wgc_.capacity;
        lists.offsets += k * wgc_.capacity;
        const uint16_t* counts = channel_counts_ + panel_index * problem_.k + k;
        const uint16_t* order = channel_order_ + panel_index * problem_.k + k;
        if (window()) {
          gather_window(u, c, channels, panel);
          wgc_.kernel->run(lists, wgc_.capacity, counts, order, part_begin(part), part_begin(part + 1), panel,
                           window_row_floats() * 4, sums, weight_sum_stride());
          continue;
        }
        for (int64_t r = 0; r < problem_.r; ++r)
          for (int64_t s = 0; s < problem_.s; ++s) {
            gather_tap(u, segment, r, s, c, channels, panel);
            wgc_.kernel->run(lists, wgc_.capacity, counts, order, part_begin(part), part_begin(part + 1), panel, 0,
                             sums + (r * problem_.s + s) * wgc_.kernel->group, weight_sum_stride());
          }
      }
    }
  }

  // Copies columns first + i * step, i < count, of a row of the input; zeros outside the image.
  void gather_row(int64_t image, int64_t h, int64_t first, int64_t step, int64_t count, int64_t c,
                  int64_t channels, float* to) const {
    const int64_t group = wgc_.kernel->group;
    int64_t begin = 0, end = 0;  // the columns inside the image
    if (h >= 0 && h < problem_.h) {
      begin = std::min(count, first >= 0 ? 0 : ceil_div(-first, step));
      end = first >= problem_.w ? begin
                                : std::max(begin, std::min(count, ceil_div(problem_.w - first, step)));
    }
    memset(to, 0, begin * group * sizeof(float));
    memset(to + end * group, 0, (count - end) * group * sizeof(float));
    if (begin == end) return;
    const int64_t at = ((image * problem_.h + h) * problem_.w + first + begin * step) * problem_.c + c;
    kernels_.gather_pixels(static_cast<const char*>(call_.input) + at * dtype_size(call_.dtype),
                           call_.dtype, step * problem_.c, end - begin, channels,
                           to + begin * group, group);
  }

  void gather_window(Unit u, int64_t c, int64_t channels, float* panel) const {
    for (int64_t row = u.row; row < u.row + u.rows;) {
      const int64_t image = row / p_;
      const int64_t rows = std::min(u.row + u.rows, (image + 1) * p_) - row;
      const int64_t h = row % p_ * problem_.stride_h - problem_.pad_h;
      for (int64_t i = 0; i < window_rows(problem_, rows); ++i, panel += window_row_floats())
        gather_row(image, h + i, -problem_.pad_w, 1, window_columns(problem_), c, channels, panel);
      row += rows;
    }
  }

  void gather_tap(Unit u, int64_t segment, int64_t r, int64_t s, int64_t c, int64_t channels,
                  float* panel) const {
    const int64_t column = segment * wgc_.segment;
    const int64_t columns = std::min(wgc_.segment, q_ - column);
    for (int64_t row = u.row; row < u.row + u.rows; ++row, panel += columns * wgc_.kernel->group)
      gather_row(row / p_, row % p_ * problem_.stride_h - problem_.pad_h + r * problem_.dil_h,
                 column * problem_.stride_w - problem_.pad_w + s * problem_.dil_w,
                 problem_.stride_w, columns, c, channels, panel);
  }

  void write_grad_weight() const {
    parallel_tasks(pool_, problem_.k, [&](int64_t k, int) {
      if (call_.grad_weight_dtype == DType::kFloat32)
        write_filter(static_cast<float*>(call_.grad_weight), k, [](float sum) { return sum; });
      else
        write_filter(static_cast<uint16_t*>(call_.grad_weight), k, bfloat16_of_float);
    });
  }

  template <class Storage, class Convert>
  void write_filter(Storage* grad_weight, int64_t k, Convert convert) const {
    const WeightStrides& strides = call_.grad_weight_strides;
    const int64_t group = wgc_.kernel->group, taps = problem_.r * problem_.s;
    for (int64_t block = 0; block < wgc_.channel_blocks; ++block) {
      const int64_t channel_task = k / k_group_ * wgc_.channel_blocks + block;
      const float* sums =
          weight_sums_ + (channel_task * k_group_ + k % k_group_) * weight_sum_stride();
      const int64_t channels = std::min(group, wgc_.channels - block * group);
      Storage* to = grad_weight + k * strides.k + block * group * strides.c;
      for (int64_t tap = 0; tap < taps; ++tap) {
        Storage* at = to + tap / problem_.s * strides.r + tap % problem_.s * strides.s;
        if (strides.c == 1)
          for (int64_t c = 0; c < channels; ++c) at[c] = convert(sums[tap * group + c]);
        else
          for (int64_t c = 0; c < channels; ++c) at[c * strides.c] = convert(sums[tap * group + c]);
      }
    }
  }

  const ConvKernels& kernels_;
  const PruneKernels& prune_kernels_;
  const TaskPool& pool_;
  const ConvBackward& call_;
  const ConvProblem& problem_;
  const int64_t p_, q_;
  const int64_t k_group_;  // output channels of a convolution group
  const AgbPlan agb_;
  const WgcPlan wgc_;
  Workspace* workspace_ = nullptr;

  int64_t chunk_images_ = 0;
  int64_t image_begin_ = 0, image_end_ = 0;  // of the current chunk
  List pixel_lists_ = {}, channel_lists_ = {};
  uint16_t* pixel_counts_ = nullptr;
  uint16_t* channel_counts_ = nullptr;
  uint16_t* channel_order_ = nullptr;
  Visit* visits_ = nullptr;
  int64_t* visit_counts_ = nullptr;
  int64_t parts_ = 1;
  uint16_t* operand_offsets_ = nullptr;
  float* weight_panels_ = nullptr;
  float* weight_sums_ = nullptr;
  float* scratch_ = nullptr;
  int64_t scratch_stride_ = 0;
  int64_t* nonzeros_ = nullptr;
};

}  // namespace

int64_t conv_backward(const ConvKernels& kernels, const PruneKernels& prune_kernels,
                      const TaskPool& pool, const ConvBackward& call) {
  return Backward(kernels, prune_kernels, pool, call).run();
}

}  // namespace sparsebwd
