// SPDX-License-Identifier: Apache-2.0
#include "lists.h"

#include <string.h>

#include <algorithm>

namespace sparsebwd {

// ---- for AGB

void PixelLists::reserve(const ConvPlan& plan, int64_t images) {
  plan_ = &plan;
  capacity_images_ = images;
  const int64_t lists = images * plan.p * plan.k_blocks();
  const int64_t tiles = ceil_div(images, plan.agb.images) * plan.p * plan.k_blocks();
  values_.reserve(lists * plan.agb.capacity);
  offsets_.reserve(lists * plan.agb.capacity);
  counts_.reserve(lists * plan.q);
  visits_.reserve(tiles * plan.agb.images * plan.q);
  visit_counts_.reserve(tiles);
}

Images PixelLists::group(int64_t index) const {
  const int64_t begin = images_.begin + index * plan_->agb.images;
  return {begin, std::min(begin + plan_->agb.images, images_.end)};
}

PixelLists::Tile PixelLists::tile(int64_t group_index, int64_t p, int64_t k_block) const {
  const int64_t index = tile_index(group_index, p, k_block);
  return {list(group(group_index).begin * plan_->p + p, k_block),
          visits_.data() + index * plan_->agb.images * plan_->q, visit_counts_.data()[index]};
}

void PixelLists::sort(int64_t group_index, int64_t p) {
  for (int64_t block = 0; block < plan_->k_blocks(); ++block) sort(group_index, p, block);
}

// Entries a pixel of an image, on average, from which on its lists are left in their order: reading
// them one after the other is then worth more than predicting where they end. Decided for each image,
// as the pixels of one image add to the same sums: the order in which they do must not depend on
// which images are listed together.
constexpr int64_t kSortedBelow = 12;

// Counting sort of the images with short lists, behind those with long ones.
void PixelLists::sort(int64_t group_index, int64_t p, int64_t k_block) {
  const Images images = group(group_index);
  const int64_t index = tile_index(group_index, p, k_block);
  Visit* const visits = visits_.data() + index * plan_->agb.images * plan_->q;
  const auto counts_of = [&](int64_t n) { return counts(n * plan_->p + p, k_block); };
  const auto is_long = [&](int64_t n) {
    int64_t entries = 0;
    for (int64_t q = 0; q < plan_->q; ++q) entries += counts_of(n)[q];
    return entries >= kSortedBelow * plan_->q;
  };
  const AgbPlan& agb = plan_->agb;
  const uint32_t pixel_bytes =
      static_cast<uint32_t>(plan_->problem.stride_w * agb.kernel->group * 4);
  // Calls place(visit) for the pixels with entries.
  const auto for_each_pixel = [&](int64_t n, auto place) {
    const uint16_t* here = counts_of(n);
    uint32_t start = static_cast<uint32_t>((n - images.begin) * plan_->p * agb.capacity);
    uint32_t dst = static_cast<uint32_t>((n - images.begin) * agb.image_floats() * 4);
    for (int64_t q = 0; q < plan_->q; ++q, dst += pixel_bytes) {
      if (here[q]) place(Visit{start, here[q], dst});
      start += here[q];
    }
  };
  uint32_t next = 0;
  uint32_t position[kMaxKBlock + 1] = {};
  bool placed[kSortedPixels] = {};
  for (int64_t n = images.begin; n < images.end; ++n) {
    if ((placed[n - images.begin] = is_long(n)))
      for_each_pixel(n, [&](Visit visit) { visits[next++] = visit; });
    else
      for (int64_t q = 0; q < plan_->q; ++q) ++position[counts_of(n)[q]];
  }
  // Longest first; pixels without entries last, and left out.
  for (int64_t count = agb.k_block; count >= 0; --count) {
    const uint32_t here = position[count];
    position[count] = next;
    next += here;
  }
  visit_counts_.data()[index] = position[0];
  for (int64_t n = images.begin; n < images.end; ++n)
    if (!placed[n - images.begin])
      for_each_pixel(n, [&](Visit visit) { visits[position[visit.count]++] = visit; });
}

// ---- for WGC

void ChannelLists::reserve(const ConvPlan& plan, int64_t images, int64_t parts) {
  plan_ = &plan;
  parts_ = parts;
  const WgcPlan& wgc = plan.wgc;
  const int64_t panels = ceil_div(images, wgc.images) * wgc.units_per_block * wgc.segments;
  const int64_t lists = panels * plan.problem.k;
  values_.reserve(lists * wgc.capacity);
  offsets_.reserve(lists * wgc.capacity);
  counts_.reserve(lists);
  order_.reserve(lists);

  const int64_t pixels = wgc.segments == 1 ? wgc.unit_rows * plan.q : wgc.segment;
  const int64_t padded = round_up(pixels, plan.kernels.lanes);
  // A tile that does not begin at a multiple of the lanes reads past the last pixel.
  operand_offsets_.reserve(padded + plan.kernels.lanes);
  for (int64_t i = 0; i < padded; ++i) {
    int64_t pixel = i;
    if (wgc.window()) {
      const int64_t row = i / plan.q, image = row / plan.p;
      const int64_t panel_row =
          image * plan.window_rows(plan.p) + row % plan.p * plan.problem.stride_h;
      pixel = panel_row * plan.window_columns() + i % plan.q * plan.problem.stride_w;
    }
    operand_offsets_.data()[i] = static_cast<uint16_t>(pixel * wgc.pitch * 4);
  }
}

void ChannelLists::clear(int64_t unit_index) {
  const int64_t lists = plan_->wgc.segments * plan_->problem.k;
  memset(counts_.data() + unit_index * lists, 0, lists * sizeof(uint16_t));
}

// Counting sort, in classes: the inner loop only has to guess right most of the time.
void ChannelLists::sort(int64_t unit_index) {
  constexpr int kClasses = 256;
  const int64_t segments = plan_->wgc.segments, groups = plan_->problem.groups;
  for (int64_t i = 0; i < segments * groups; ++i) {
    const int64_t first = unit_index * segments * plan_->problem.k + i * plan_->k_group;
    const auto class_of = [counts = counts_.data() + first](int64_t k) {
      return std::min<int64_t>(counts[k], kClasses - 1);
    };
    for (int64_t part = 0; part < parts_; ++part) {
      uint16_t position[kClasses] = {};
      for (int64_t k = part_begin(part); k < part_begin(part + 1); ++k) ++position[class_of(k)];
      int64_t sum = part_begin(part);
      for (uint16_t& entry : position) {
        const uint16_t here = entry;
        entry = static_cast<uint16_t>(sum);
        sum += here;
      }
      for (int64_t k = part_begin(part); k < part_begin(part + 1); ++k)
        order_.data()[first + position[class_of(k)]++] = static_cast<uint16_t>(k);
    }
  }
}

// ---- one pass over the gradient

namespace {

// Prunes or converts whole rows into `out` and `tile`, either of which may be null; returns the
// number of non-zeros.
int64_t stage(const ConvPlan& plan, const char* source, char* out, Rows rows, float* tile) {
  const ConvBackward& call = plan.call;
  const int64_t k = plan.problem.k;
  if (!call.prune)
    return plan.prune_kernels.load_pixels_nhwc(source, call.dtype, k, out, tile, k,
                                               rows.count * plan.q, k);
  const int64_t row_bytes = plan.q * k * dtype_size(call.dtype);
  int64_t found = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.first + i, image = row / plan.p;
    found += plan.prune_kernels.prune_pixels_nhwc(
        source + i * row_bytes, call.dtype, k, out ? out + i * row_bytes : nullptr,
        tile ? tile + i * plan.q * k : nullptr, k, static_cast<uint32_t>(image),
        static_cast<uint32_t>(row % plan.p), 0, plan.q, k, of_image(*call.prune, call.taus, image));
  }
  return found;
}

// The same from planes, into `tile`; of what is not pruned, the number of non-zeros is not counted. What
// is pruned is written back to planes from there, where that is wanted.
int64_t stage_planes(const ConvPlan& plan, Rows rows, float* tile) {
  const ConvBackward& call = plan.call;
  const int64_t k = plan.problem.k, plane = plan.p * plan.q;
  int64_t found = 0;
  for (int64_t row = rows.first; row < rows.first + rows.count;) {
    const int64_t image = row / plan.p,
                  end = std::min(rows.first + rows.count, (image + 1) * plan.p);
    const int64_t at = image * k * plane + row % plan.p * plan.q, pixels = (end - row) * plan.q;
    plan.kernels.transpose(static_cast<const float*>(call.grad_output) + at, plane, 1, k, pixels,
                           tile, k);
    if (call.prune)
      for (int64_t i = row; i < end; ++i) {
        float* values = tile + (i - row) * plan.q * k;
        found += plan.prune_kernels.prune_pixels_nhwc(values, DType::kFloat32, k, values, nullptr,
                                                      k, static_cast<uint32_t>(image),
                                                      static_cast<uint32_t>(i % plan.p), 0, plan.q,
                                                      k, of_image(*call.prune, call.taus, image));
      }
    if (call.pruned)
      plan.kernels.transpose(tile, k, 1, pixels, k, static_cast<float*>(call.pruned) + at, plane);
    tile += pixels * k;
    row = end;
  }
  return found;
}

int64_t list_by_pixel(const ConvPlan& plan, const float* g, Rows rows, PixelLists& lists,
                      Fullness& recent) {
  int64_t found = 0;
  for (int64_t i = 0; i < rows.count; ++i)
    for (int64_t block = 0; block < plan.k_blocks(); ++block)
      found += plan.kernels.list_by_pixel(g + i * plan.q * plan.problem.k + plan.k_begin(block),
                                          plan.problem.k, plan.q, plan.k_size(block),
                                          plan.agb.step(), lists.list(rows.first + i, block),
                                          lists.counts(rows.first + i, block), recent);
  return found;
}

// Up to a density of 1 / so many, lists by channel are made of the lists by pixel, where these are wanted
// too. Above, and alone, it is faster to transpose tiles of the gradient.
constexpr int64_t kScatterBelow = 8;
constexpr int64_t kScatteredPixels = 32;
constexpr int64_t kSpread = 16;  // entries that get their pixel's offset at once

// Appends the entries of `pixels` pixels, of kMaxKBlock channels or fewer, to the lists of their
// channels, and advances behind them: a counting sort but for the counting, as lists have room. An
// offset times 2^-32 `channels_per_byte` is a channel.
void append_pixels(List& from, const uint16_t* pixel_counts, int64_t pixels,
                   uint64_t channels_per_byte, const uint16_t* operand_offsets, List lists,
                   int64_t capacity, uint16_t* counts) {
  // Where a pixel's entries end cannot be predicted: the loop over entries does not ask.
  uint16_t offsets[kScatteredPixels * kMaxKBlock + kSpread];
  for (int64_t first = 0; first < pixels; first += kScatteredPixels) {
    const int64_t last = std::min(first + kScatteredPixels, pixels);
    int64_t entries = 0;
    for (int64_t i = first; i < last; ++i) {
      for (int64_t begin = 0; begin < pixel_counts[i]; begin += kSpread)
        std::fill_n(offsets + entries + begin, kSpread, operand_offsets[i]);
      entries += pixel_counts[i];
    }
    for (int64_t i = 0; i < entries; ++i) {
      const auto k = static_cast<int64_t>(from.offsets[i] * channels_per_byte >> 32);
      const int64_t at = k * capacity + counts[k]++;
      lists.values[at] = from.values[i];
      lists.offsets[at] = offsets[i];
    }
    from.values += entries;
    from.offsets += entries;
  }
}

// Lists by channel of a tile: `rows.first` counts from the unit's first row here.
class ChannelListing {
 public:
  ChannelListing(const ConvPlan& plan, int64_t unit_index, ChannelLists& lists)
      : plan_(plan), unit_index_(unit_index), lists_(lists) {}

  // From the dense gradient.
  int64_t from_gradient(const float* g, Rows rows) {
    int64_t found = 0;
    for_each_segment(rows, [&](int64_t column, int64_t pixels, Target to) {
      found += plan_.kernels.list_by_channel(g + column * plan_.problem.k, plan_.problem.k, pixels,
                                             plan_.problem.k, to.operand_offsets, to.lists,
                                             plan_.wgc.capacity, to.counts);
    });
    return found;
  }

  // From the lists of pixels of the same rows, the first of which is row `first_row`.
  void from_pixels(const PixelLists& from, int64_t first_row, Rows rows) {
    const uint64_t channels_per_byte = ceil_div(int64_t{1} << 32, plan_.agb.step());
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t block = 0; block < plan_.k_blocks(); ++block) {
        const int64_t row = first_row + i, begin = plan_.k_begin(block);
        List list = from.list(row, block);
        for_each_segment({rows.first + i, 1}, [&](int64_t column, int64_t pixels, Target to) {
          append_pixels(list, from.counts(row, block) + column, pixels, channels_per_byte,
                        to.operand_offsets, to.from(begin, plan_.wgc.capacity), plan_.wgc.capacity,
                        to.counts + begin);
        });
      }
  }

 private:
  // The lists that pixels of a segment are appended to.
  struct Target {
    List lists;
    uint16_t* counts;
    const uint16_t* operand_offsets;  // of the first pixel

    List from(int64_t k, int64_t capacity) const {
      return {lists.values + k * capacity, lists.offsets + k * capacity};
    }
  };

  // Calls append(first column, pixels, Target).
  template <class Append>
  void for_each_segment(Rows rows, Append append) {
    const WgcPlan& wgc = plan_.wgc;
    for (int64_t segment = 0; segment < wgc.segments; ++segment) {
      // One segment: its pixels are consecutive through all rows. More: a unit is one row.
      const int64_t column = segment * wgc.segment;
      const int64_t pixels =
          wgc.segments == 1 ? rows.count * plan_.q : std::min(wgc.segment, plan_.q - column);
      const int64_t panel = unit_index_ * wgc.segments + segment;
      append(column, pixels,
             Target{lists_.list(panel), lists_.counts(panel),
                    lists_.operand_offsets() + rows.first * plan_.q});
    }
  }

  const ConvPlan& plan_;
  const int64_t unit_index_;
  ChannelLists& lists_;
};

}  // namespace

int64_t list_unit(const ConvPlan& plan, Rows unit, int64_t unit_index, PixelLists* pixel_lists,
                  ChannelLists* channel_lists, float* scratch) {
  const ConvBackward& call = plan.call;
  if (channel_lists) channel_lists->clear(unit_index);
  int64_t staged = 0, by_pixel = 0, by_channel = 0;
  Fullness recent;
  for (int64_t i = 0; i < unit.count; i += plan.tile_rows()) {
    const Rows rows = {unit.first + i, std::min(plan.tile_rows(), unit.count - i)};
    const int64_t at = rows.first * plan.q * plan.problem.k * dtype_size(call.dtype);
    const char* source = static_cast<const char*>(call.grad_output) + at;
    const float* g = reinterpret_cast<const float*>(source);
    if (call.grad_output_planes) {
      staged += stage_planes(plan, rows, scratch);
      g = scratch;
    } else if (plan.staged()) {
      char* out = call.pruned ? static_cast<char*>(call.pruned) + at : nullptr;
      // Pruned values that are kept as float32 need no second copy.
      const bool keeps = out && call.dtype == DType::kFloat32;
      staged += stage(plan, source, out, rows, keeps ? nullptr : scratch);
      g = keeps ? reinterpret_cast<const float*>(out) : scratch;
    }
    int64_t found = rows.count * plan.q * plan.problem.k;
    if (pixel_lists) by_pixel += found = list_by_pixel(plan, g, rows, *pixel_lists, recent);
    if (channel_lists) {
      ChannelListing listing(plan, unit_index, *channel_lists);
      const Rows in_unit = {i, rows.count};
      if (found * kScatterBelow < rows.count * plan.q * plan.problem.k)
        listing.from_pixels(*pixel_lists, rows.first, in_unit);
      else by_channel += listing.from_gradient(g, in_unit);
    }
  }
  if (channel_lists) channel_lists->sort(unit_index);
  const bool counted = plan.staged() && (call.prune || !call.grad_output_planes);
  return counted ? staged : pixel_lists ? by_pixel : by_channel;
}

}  // namespace sparsebwd
