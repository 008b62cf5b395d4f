// SPDX-License-Identifier: Apache-2.0
// The gradient's non-zeros in the two orders that AGB and WGC consume, built in one pass that also
// prunes.
#pragma once

#include <stdint.h>

#include "buffer.h"
#include "conv_plan.h"

namespace sparsebwd {

// For AGB: a list for every row of the gradient and k-block, pixel after pixel; and for every tile
// (the same row of a group of images) its pixels in the order of their visits: see sort().
class PixelLists {
 public:
  void reserve(const ConvPlan& plan, int64_t images);
  void start(Images images) { images_ = images; }

  List list(int64_t row, int64_t k_block) const {
    const int64_t at = index(row, k_block) * plan_->agb.capacity;
    return {values_.data() + at, offsets_.data() + at};
  }
  uint16_t* counts(int64_t row, int64_t k_block) const {
    return counts_.data() + index(row, k_block) * plan_->q;
  }

  // Groups of images are numbered from the first image on.
  int64_t groups() const { return ceil_div(images_.count(), plan_->agb.images); }
  Images group(int64_t index) const;

  // Pixels with entries only; `dst` of a visit is relative to column 0 of its row in the partial
  // sums of the group's first image.
  struct Tile {
    List list;
    const Visit* visits;
    int64_t count;
  };
  Tile tile(int64_t group_index, int64_t p, int64_t k_block) const;
  // Short lists by the number of their entries, so that where they end is predictable; long ones as
  // they lie in memory.
  void sort(int64_t group_index, int64_t p);

 private:
  int64_t index(int64_t row, int64_t k_block) const {
    return k_block * capacity_images_ * plan_->p + (row - images_.begin * plan_->p);
  }
  int64_t tile_index(int64_t group_index, int64_t p, int64_t k_block) const {
    return (k_block * ceil_div(capacity_images_, plan_->agb.images) + group_index) * plan_->p + p;
  }
  void sort(int64_t group_index, int64_t p, int64_t k_block);

  const ConvPlan* plan_ = nullptr;
  Images images_ = {};
  int64_t capacity_images_ = 0;
  Buffer<float> values_;
  Buffer<uint16_t> offsets_, counts_;
  Buffer<Visit> visits_;
  Buffer<int64_t> visit_counts_;
};

// For WGC: a list for every panel of pixels and output channel, and for every panel the channels of
// each convolution group, sorted by the length of their lists within each of `parts` parts.
class ChannelLists {
 public:
  void reserve(const ConvPlan& plan, int64_t images, int64_t parts);
  void start(Images images) { images_ = images; }

  Images images() const { return images_; }

  List list(int64_t panel) const {
    const int64_t at = panel * plan_->problem.k * plan_->wgc.capacity;
    return {values_.data() + at, offsets_.data() + at};
  }
  uint16_t* counts(int64_t panel) const { return counts_.data() + panel * plan_->problem.k; }
  const uint16_t* order(int64_t panel) const { return order_.data() + panel * plan_->problem.k; }
  int64_t part_begin(int64_t part) const { return plan_->k_group * part / parts_; }
  int64_t parts() const { return parts_; }

  // Byte offset in a panel of input of the operand of pixel i of the panel's gradient.
  const uint16_t* operand_offsets() const { return operand_offsets_.data(); }

  // Units (see ConvPlan) are numbered from the first image on.
  void clear(int64_t unit_index);
  void sort(int64_t unit_index);

 private:
  const ConvPlan* plan_ = nullptr;
  Images images_ = {};
  int64_t parts_ = 1;
  Buffer<float> values_;
  Buffer<uint16_t> offsets_, counts_, order_, operand_offsets_;
};

// Prunes if asked to and lists the rows of a unit, number `unit_index` of `channel_lists`. Either kind
// of lists may be null. `scratch` holds plan.tile_floats() floats. Returns the number of non-zeros.
int64_t list_unit(const ConvPlan& plan, Rows unit, int64_t unit_index, PixelLists* pixel_lists,
                  ChannelLists* channel_lists, float* scratch);

}  // namespace sparsebwd
