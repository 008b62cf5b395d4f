// SPDX-License-Identifier: Apache-2.0
#include "prune.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
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

namespace {

constexpr int64_t kHistogramTask = 256 * 1024;

// Two tables, as neighbours often fall into the same bin, and one increment would wait for the other.
struct Tables {
  uint32_t counts[2][kHistogramBins];
};

// Bits: an integer of the size of an element, whose upper bits are those of a float32.
template <class Bits>
void count_bins(const void* g, int64_t count, Tables& tables) {
  constexpr int kUnused = 32 - 8 * static_cast<int>(sizeof(Bits));
  const char* from = static_cast<const char*>(g);
  const auto bin = [&](int64_t i) {
    Bits bits;
    memcpy(&bits, from + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    return (static_cast<uint32_t>(bits) << kUnused & 0x7fffffffu) >> kHistogramShift;
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    ++tables.counts[0][bin(i)];
    ++tables.counts[1][bin(i + 1)];
  }
  if (i < count) ++tables.counts[0][bin(i)];
}

}  // namespace

void histogram(const TaskPool& pool, const void* g, DType dtype, int64_t count, int64_t* counts) {
  std::fill(counts, counts + kHistogramBins, 0);
  std::mutex adding;
  parallel_tasks(pool, ceil_div(count, kHistogramTask), [&](int64_t task, int) {
    const int64_t begin = task * kHistogramTask;
    const int64_t size = std::min(kHistogramTask, count - begin);
    const auto tables = std::make_unique<Tables>();
    const auto count_task =
        dtype == DType::kFloat32 ? &count_bins<uint32_t> : &count_bins<uint16_t>;
    count_task(at(g, dtype, begin), size, *tables);
    const std::lock_guard<std::mutex> lock(adding);
    for (int64_t bin = 0; bin < kHistogramBins; ++bin)
      counts[bin] += tables->counts[0][bin] + tables->counts[1][bin];
  });
}

namespace {

// Two cache lines each. Their number is prime, so that they do not meet the same pixels of every image.
constexpr int64_t kSampledRuns = 127;
constexpr int64_t kSampledRun = 32;
constexpr int64_t kFetchedRuns = 8;  // ahead: they are too far apart for the hardware to foresee

// Sum of min(|g| * scale, 1).
template <class Load>
double clipped_sum(int64_t count, float scale, Load load) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  const auto clipped = [&](int64_t i) {
    const float magnitude = std::fabs(load(i)) * scale;
    return magnitude < 1.0f ? magnitude : 1.0f;
  };
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += clipped(i + j);
  for (; i < count; ++i) sums[i % kSums] += clipped(i);
  double total = 0.0;
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace

double expected_density(const PruneKernels& kernels, const void* g, DType dtype, int64_t count,
                        double taus_per_mean) {
  if (count == 0) return 0.0;
  const bool all = count <= kSampledRuns * kSampledRun;
  const int64_t runs = all ? 1 : kSampledRuns, length = all ? count : kSampledRun;
  const int64_t distance = count / runs;
  const int64_t bytes = length * dtype_size(dtype);
  const auto run = [&](int64_t i) { return at(g, dtype, i * distance); };
  double sum = 0.0;
  int64_t nonzeros = 0;
  for (int64_t i = 0; i < runs; ++i) {
    for (int64_t byte = 0; byte < bytes && i + kFetchedRuns < runs; byte += 64)
      __builtin_prefetch(static_cast<const char*>(run(i + kFetchedRuns)) + byte);
    int64_t found;
    sum += kernels.abs_sum(run(i), dtype, length, &found);
    nonzeros += found;
  }
  const auto sampled = static_cast<double>(runs * length);
  if (taus_per_mean == 0.0) return static_cast<double>(nonzeros) / sampled;
  if (!std::isfinite(sum)) return 1.0;
  if (nonzeros == 0) return 0.0;
  const auto scale = static_cast<float>(sampled / (sum * taus_per_mean));
  double left = 0.0;
  for (int64_t i = 0; i < runs; ++i) {
    const auto* floats = static_cast<const float*>(run(i));
    const auto* halves = static_cast<const uint16_t*>(run(i));
    left +=
        dtype == DType::kFloat32
            ? clipped_sum(length, scale, [&](int64_t j) { return floats[j]; })
            : clipped_sum(length, scale, [&](int64_t j) { return float_of_bfloat16(halves[j]); });
  }
  return left / sampled;
}

int64_t prune(const PruneKernels& kernels, const TaskPool& pool, const void* g, DType dtype,
              const PruneShape& shape, const PruneSpec& spec, const float* taus, void* out) {
  const int64_t count = shape.n * shape.c * shape.h * shape.w;
  if (count == 0) return 0;
  std::atomic<int64_t> nonzeros{0};

  if (!taus && spec.tau == 0.0f) {
    parallel_tasks(pool, ceil_div(count, kTaskElements), [&](int64_t task, int) {
      const int64_t begin = task * kTaskElements;
      nonzeros +=
          kernels.load_pixels_nhwc(at(g, dtype, begin), dtype, kTaskElements, at(out, dtype, begin),
                                   nullptr, 0, 1, std::min(kTaskElements, count - begin));
    });
  } else if (shape.channels_last) {
    const int64_t pixels = shape.n * shape.h * shape.w;
    const int64_t task_pixels = std::max<int64_t>(1, kTaskElements / shape.c);
    parallel_tasks(pool, ceil_div(pixels, task_pixels), [&](int64_t task, int) {
      int64_t pixel = task * task_pixels;
      const int64_t end = std::min(pixels, pixel + task_pixels);
      int64_t found = 0;
      while (pixel < end) {
        const int64_t row = pixel / shape.w, w = pixel % shape.w, n = row / shape.h;
        const int64_t run = std::min(end - pixel, shape.w - w);
        found += kernels.prune_pixels_nhwc(
            at(g, dtype, pixel * shape.c), dtype, shape.c, at(out, dtype, pixel * shape.c), nullptr,
            0, static_cast<uint32_t>(n), static_cast<uint32_t>(row % shape.h),
            static_cast<uint32_t>(w), run, shape.c, of_image(spec, taus, n));
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
      const int64_t c_end = std::min(shape.c, c + channels), pixels = std::min(run, plane - first);
      const PruneSpec own = of_image(spec, taus, n);
      if (own.tau == 0.0f)
        // To what only copies, parts of planes are pixels.
        nonzeros +=
            kernels.load_pixels_nhwc(at(g, dtype, offset + first), dtype, plane,
                                     at(out, dtype, offset + first), nullptr, 0, c_end - c, pixels);
      else
        nonzeros += kernels.prune_planes_nchw(at(g, dtype, offset), dtype, plane,
                                              at(out, dtype, offset), static_cast<uint32_t>(n), c,
                                              c_end, first, pixels, shape.w, own);
    });
  }
  return nonzeros;
}

}  // namespace sparsebwd
