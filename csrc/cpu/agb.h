// SPDX-License-Identifier: Apache-2.0
// AGB: the gradient of the input, from the lists of the gradient and the weights.
#pragma once

#include "buffer.h"
#include "conv_plan.h"
#include "lists.h"
#include "parallel.h"

namespace sparsebwd {

class Agb {
 public:
  // Packs the weights into panels.
  void start(const ConvPlan& plan, const TaskPool& pool);

  // A task: a band of rows of grad_input, in one group of images of the lists and one block of input
  // channels.
  int64_t tasks(const PixelLists& lists) const;
  void run(const PixelLists& lists, int64_t task, float* scratch) const;
  int64_t scratch_floats() const { return plan_->agb.images * plan_->agb.image_floats(); }

 private:
  int64_t panel(int64_t k_block, int64_t channel_block, int64_t r, int64_t column_step) const;
  void load_weights(int64_t from, int64_t channels, float* to) const;
  void write(Images images, Rows rows, int64_t channel_task, const float* sums) const;

  const ConvPlan* plan_ = nullptr;
  Buffer<float> panels_;
};

}  // namespace sparsebwd
