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

}  // namespace sparsebwd
