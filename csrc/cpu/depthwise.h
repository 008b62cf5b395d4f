// SPDX-License-Identifier: Apache-2.0
// The backward pass of a depthwise convolution: dense, both gradients in one pass over the gradient.
#pragma once

#include <stdint.h>

#include "conv_backward.h"
#include "depthwise_kernels.h"
#include "parallel.h"
#include "sparsebwd/conv_problem.h"

namespace sparsebwd {

// An activation, null if it is not there: [n][c][h][w] if it is planes, else [n][h][w][c].
struct Activation {
  void* data;
  bool planes;
};

// One call. groups == c; output channel k belongs to input channel k / (k / c).
struct DepthwiseBackward {
  ConvProblem problem;
  DType dtype;  // of the activations
  Activation grad_output;

  // WGC runs if there is a grad_weight.
  Activation input;
  void* grad_weight;
  DType grad_weight_dtype;
  WeightStrides grad_weight_strides;

  // AGB runs if there is a grad_input.
  const void* weight;
  DType weight_dtype;
  WeightStrides weight_strides;
  Activation grad_input;
};

// Why these kernels do not take the problem, as a sentence without a full stop; null if they do.
const char* depthwise_refusal(const ConvProblem& problem);

// Results do not depend on the number of threads.
void depthwise_backward(const DepthwiseKernels& kernels, const TaskPool& pool,
                        const DepthwiseBackward& call);

}  // namespace sparsebwd
