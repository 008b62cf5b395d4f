// SPDX-License-Identifier: Apache-2.0
// The two backward convolutions on a sparse gradient, in parallel.
#pragma once

#include <stdint.h>

#include "conv_kernels.h"
#include "parallel.h"
#include "prune_kernels.h"
#include "sparsebwd/conv_problem.h"

namespace sparsebwd {

// Activations are of one dtype and channels-last (memory order n, h, w, c), or where a call says so, and
// in float32 only, contiguous: planes, in the order n, c, h, w. Weights have any strides, in elements.
struct WeightStrides {
  int64_t k, c, r, s;
};

struct ConvBackward {
  ConvProblem problem;
  DType dtype;
  const void* grad_output;  // [n][p][q][k]
  const PruneSpec* prune;   // null: use the gradient as it is
  const float* taus;        // of images, see of_image()
  void* pruned;             // null, or as grad_output: receives the gradient that was used
  bool grad_output_planes;

  // AGB: done if grad_input is not null.
  const void* weight;
  DType weight_dtype;
  WeightStrides weight_strides;
  void* grad_input;  // [n][h][w][c]
  bool grad_input_planes;

  // WGC: done if grad_weight is not null.
  const void* input;  // [n][h][w][c]
  bool input_planes;
  void* grad_weight;
  DType grad_weight_dtype;
  WeightStrides grad_weight_strides;

  // Only prune and build the lists of both convolutions: to measure what that costs.
  bool lists_only;
};

// Prunes and lists the gradient's non-zeros in one pass, and runs AGB and WGC on the lists, a few
// images at a time so that the lists stay in cache. Returns the number of non-zeros. Results do not
// depend on the number of threads.
int64_t conv_backward(const ConvKernels& kernels, const PruneKernels& prune_kernels,
                      const TaskPool& pool, const ConvBackward& call);

}  // namespace sparsebwd
