// SPDX-License-Identifier: Apache-2.0
// The one description of a 2-D convolution that every native kernel reads.
#pragma once

#include <stdint.h>

#include "sparsebwd/host_device.h"

namespace sparsebwd {

// Tensors are input [n][h][w][c], weight [k][c/groups][r][s], output [n][p][q][k] (logical order
// of the last three differs only by layout). Strides, padding and dilation as in torch.conv2d.
struct ConvProblem {
  int64_t n, c, h, w;
  int64_t k, r, s;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dil_h, dil_w;
  int64_t groups;

  SPARSEBWD_HOST_DEVICE int64_t p() const {
    return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1;
  }
  SPARSEBWD_HOST_DEVICE int64_t q() const {
    return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1;
  }
};

// Why no native kernel takes the problem, as a sentence without a full stop; null if some may. For sizes
// that checks.h accepts and any settings: it is asked before p() and q() are, which could overflow.
// What kernels multiply fits 64 bits then: products of two of a problem's numbers, and elements times
// what a kernel holds for each. What a kernel counts in fewer bits it refuses itself.
static inline const char* problem_refusal(const ConvProblem& problem) {
  constexpr int64_t kMost = INT32_MAX;
  constexpr double kMostElements = 1LL << 46;  // only tensors without elements have such shapes
  const int64_t sizes[] = {problem.n, problem.c, problem.h, problem.w,
                           problem.k, problem.r, problem.s};
  for (const int64_t size : sizes)
    if (size > kMost) return "a size is above 2147483647";
  const int64_t settings[] = {problem.stride_h, problem.stride_w, problem.pad_h,
                              problem.pad_w,    problem.dil_h,    problem.dil_w};
  for (const int64_t setting : settings)
    if (setting > kMost) return "a stride, padding or dilation is above 2147483647";
  if (problem.h + 2 * problem.pad_h > kMost || problem.w + 2 * problem.pad_w > kMost)
    return "a side of the input with its padding is above 2147483647";
  const auto elements = [&](int64_t channels, int64_t height, int64_t width) {
    const double n = static_cast<double>(problem.n > 0 ? problem.n : 1);
    return n * static_cast<double>(channels) * static_cast<double>(height) *
           static_cast<double>(width);
  };
  if (elements(problem.c, problem.h, problem.w) > kMostElements ||
      elements(problem.k, problem.p(), problem.q()) > kMostElements)
    return "the input or the output has more than 2^46 elements";
  return nullptr;
}

}  // namespace sparsebwd
