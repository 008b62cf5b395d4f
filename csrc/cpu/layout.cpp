// SPDX-License-Identifier: Apache-2.0
#include "layout.h"

#include <algorithm>

#include "sparsebwd/integers.h"

namespace sparsebwd {
namespace {

// Columns of a task: whole cache lines, so that workers share none of the source.
constexpr int64_t kBand = 256;

}  // namespace

void transpose_images(const ConvKernels& kernels, const TaskPool& pool, const float* src,
                      int64_t count, int64_t rows, int64_t columns, float* dst) {
  const int64_t bands = ceil_div(columns, kBand);
  parallel_tasks(pool, count * bands, [&](int64_t task, int) {
    const int64_t image = task / bands * rows * columns, column = task % bands * kBand;
    kernels.transpose(src + image + column, columns, 1, rows, std::min(kBand, columns - column),
                      dst + image + column * rows, rows);
  });
}

}  // namespace sparsebwd
