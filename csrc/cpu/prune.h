// SPDX-License-Identifier: Apache-2.0
// Sum of magnitudes and stochastic pruning of whole tensors, in parallel.
#pragma once

#include <stdint.h>

#include "parallel.h"
#include "prune_kernels.h"

namespace sparsebwd {

struct AbsSum {
  double sum;         // of |g|, in float64
  int64_t nonzeros;
};

// Over `count` elements in memory order. Chunks are of a fixed size and are added in order: the
// result does not depend on the number of threads or on the instruction set.
AbsSum abs_sum(const PruneKernels& kernels, const TaskPool& pool, const void* g, DType dtype,
               int64_t count);

// A magnitude's bin is the bits of its float32 >> kHistogramShift (python/sparsebwd/histogram.py).
constexpr int kHistogramShift = 19;
constexpr int64_t kHistogramBins = (int64_t{1} << 31) >> kHistogramShift;

// How many of `count` elements have magnitudes in each bin.
void histogram(const TaskPool& pool, const void* g, DType dtype, int64_t count, int64_t* counts);

// The share of `count` elements that is expected to be left once they are pruned at tau = mean |g| *
// taus_per_mean, by a sample: runs of elements spread evenly over memory, whose tau is that of the sample; of few
// elements all.
// 0: the share of elements that are not zero. 1 where pruning finds a sample that is not finite.
double expected_density(const PruneKernels& kernels, const void* g, DType dtype, int64_t count,
                        double taus_per_mean);

// Writes the pruned g to out, which has the same layout and may be g itself. `taus`: see of_image().
// Returns the number of non-zeros.
int64_t prune(const PruneKernels& kernels, const TaskPool& pool, const void* g, DType dtype,
              const PruneShape& shape, const PruneSpec& spec, const float* taus, void* out);

}  // namespace sparsebwd
