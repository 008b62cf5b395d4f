// SPDX-License-Identifier: Apache-2.0
// WGC: the gradient of the weight, from the lists of the gradient and the input.
#pragma once

#include "buffer.h"
#include "conv_plan.h"
#include "lists.h"
#include "parallel.h"

namespace sparsebwd {

class Wgc {
 public:
  // Groups of images have sums of their own, which finish() adds in order. If the lists hold all
  // images `at_once`, each task has sums in its scratch, which it writes to grad_weight itself.
  void start(const ConvPlan& plan, int64_t groups, bool at_once);
  static int64_t sum_floats(const ConvPlan& plan);  // of one group of images

  // Adds what the images of the lists contribute to a group's sums. A task: one block of input
  // channels and one part of the output channels.
  int64_t tasks(const ChannelLists& lists) const;
  void run(const ChannelLists& lists, int64_t group, int64_t task, float* scratch) const;
  int64_t scratch_floats() const;

  void finish(const TaskPool& pool) const;

 private:
  // Panels of input: `group` channels of the pixels that a panel's gradient meets.
  struct Block {
    int64_t c, channels;  // first input channel, number of them
  };
  void gather_row(int64_t image, int64_t h, int64_t first, int64_t step, int64_t count, Block block,
                  float* to) const;
  void gather_window(Rows rows, Block block, float* panel) const;
  void gather_tap(Rows rows, int64_t segment, int64_t r, int64_t s, Block block,
                  float* panel) const;

  Upcoming input_pixels(Rows rows, Block block) const;

  // Sums of one block of input channels to output channel k of its convolution group.
  void write(int64_t channel_task, int64_t k, const float* sums) const;
  template <class Storage, class Convert>
  void write(Storage* grad_weight, int64_t channel_task, int64_t k, const float* sums,
             Convert convert) const;

  const ConvPlan* plan_ = nullptr;
  int64_t groups_ = 0;
  bool at_once_ = false;
  // [group][block of input channels][output channel of its group][row, column][channel]
  Buffer<float> sums_;
};

}  // namespace sparsebwd
