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

// Writes the pruned g to out, which has the same layout and may be g itself. Returns the number of
// non-zeros.
int64_t prune(const PruneKernels& kernels, const TaskPool& pool, const void* g, DType dtype,
              const PruneShape& shape, const PruneSpec& spec, void* out);

}  // namespace sparsebwd
