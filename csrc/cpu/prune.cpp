// SPDX-License-Identifier: Apache-2.0
#include "prune.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "sparsebwd/integers.h"

namespace sparsebwd {
namespace {

constexpr int64_t kSumChunk = 16 * 1024;   // elements; part of the definition of the sum
constexpr int64_t kTaskElements = 32 * 1024;

const void* at(const void* base, DType dtype, int64_t element) {
  return static_cast<const char*>(base) + element * dtype_size(dtype);
}

void* at(void* base, DType dtype, int64_t element) {
  return static_cast<char*>(base) + element * dtype_size(dtype);
}

}  // namespace

AbsSum abs_sum(const PruneKernels& kernels, const TaskPool& pool, const void* g, DType dtype,
               int64_t count) {
  std::vector<AbsSum> chunks(static_cast<size_t>(ceil_div(count, kSumChunk)));
  parallel_tasks(pool, static_cast<int64_t>(chunks.size()), [&](int64_t chunk, int) {
    const int64_t begin = chunk * kSumChunk;
    AbsSum& result = chunks[static_cast<size_t>(chunk)];
    result.sum = kernels.abs_sum(at(g, dtype, begin), dtype, std::min(kSumChunk, count - begin),
                                 &result.nonzeros);
  });
  AbsSum total = {0.0, 0};
  for (const AbsSum& chunk : chunks) {
    total.sum += chunk.sum;
    total.nonzeros += chunk.nonzeros;
  }
  return total;
}

int64_t prune(const PruneKernels& kernels, const TaskPool& pool, const void* g, DType dtype,
              const PruneShape& shape, const PruneSpec& spec, void* out) {
  const int64_t count = shape.n * shape.c * shape.h * shape.w;
  if (count == 0) return 0;
  std::atomic<int64_t> nonzeros{0};

  if (spec.tau == 0.0f) {
    parallel_tasks(pool, ceil_div(count, kTaskElements), [&](int64_t task, int) {
      const int64_t begin = task * kTaskElements;
      nonzeros += kernels.load_pixels_nhwc(at(g, dtype, begin), dtype, kTaskElements,
                                           at(out, dtype, begin), nullptr, 0, 1,
                                           std::min(kTaskElements, count - begin));
    });
  } else if (shape.channels_last) {
    const int64_t pixels = shape.n * shape.h * shape.w;
    const int64_t task_pixels = std::max<int64_t>(1, kTaskElements / shape.c);
    parallel_tasks(pool, ceil_div(pixels, task_pixels), [&](int64_t task, int) {
      int64_t pixel = task * task_pixels;
      const int64_t end = std::min(pixels, pixel + task_pixels);
      int64_t found = 0;
      while (pixel < end) {
        const int64_t row = pixel / shape.w, w = pixel % shape.w;
        const int64_t run = std::min(end - pixel, shape.w - w);
        found += kernels.prune_pixels_nhwc(
            at(g, dtype, pixel * shape.c), dtype, shape.c, at(out, dtype, pixel * shape.c), nullptr,
            0, static_cast<uint32_t>(row / shape.h), static_cast<uint32_t>(row % shape.h),
            static_cast<uint32_t>(w), run, shape.c, spec);
        pixel += run;
      }
      nonzeros += found;
    });
  } else {
    // Large planes are cut into runs of pixels; of small ones a task takes several channels.
    const int64_t plane = shape.h * shape.w;
    const int64_t run = std::min(plane, kTaskElements / 4);
    const int64_t runs = ceil_div(plane, run);
    const int64_t channels = std::max<int64_t>(4, kTaskElements / run / 4 * 4);
    const int64_t groups = ceil_div(shape.c, channels);
    parallel_tasks(pool, shape.n * groups * runs, [&](int64_t task, int) {
      const int64_t first = task % runs * run;
      const int64_t c = task / runs % groups * channels;
      const int64_t n = task / runs / groups;
      const int64_t offset = (n * shape.c + c) * plane;
      nonzeros += kernels.prune_planes_nchw(
          at(g, dtype, offset), dtype, plane, at(out, dtype, offset), static_cast<uint32_t>(n), c,
          std::min(shape.c, c + channels), first, std::min(run, plane - first), shape.w, spec);
    });
  }
  return nonzeros;
}

}  // namespace sparsebwd
