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
  // Packs the weights into panels, unless the lists hold all images `at_once` and a panel is used so
  // seldom that tasks better pack it for themselves.
  void start(const ConvPlan& plan, const TaskPool& pool, bool at_once);

  // A task: a band of rows of grad_input, in one group of images of the lists and one block of input
  // channels.
  int64_t tasks(const PixelLists& lists) const;
  void run(const PixelLists& lists, int64_t task, float* scratch) const;
  int64_t scratch_floats() const;

 private:
  struct Panel {
    int64_t k_block, channel_block, r, column_step;
  };
  int64_t index(Panel panel) const;
  void pack(Panel panel, float* to) const;
  void write(Images images, Rows rows, int64_t channel_task, const float* sums) const;

  const ConvPlan* plan_ = nullptr;
  bool packed_ = true;
  Buffer<float> panels_;
};

}  // namespace sparsebwd
