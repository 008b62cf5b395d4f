// SPDX-License-Identifier: Apache-2.0
// From contiguous tensors to channels-last ones and back, several times as fast as PyTorch does it.
#pragma once

#include <stdint.h>

#include "conv_kernels.h"
#include "parallel.h"

namespace sparsebwd {

// Transposes `count` matrices of rows x columns elements each, one behind the other: of an image with
// rows = channels and columns = pixels to channels-last, with rows = pixels and columns = channels back.
void transpose_images(const ConvKernels& kernels, const TaskPool& pool, const float* src,
                      int64_t count, int64_t rows, int64_t columns, float* dst);

}  // namespace sparsebwd
