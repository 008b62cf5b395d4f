// SPDX-License-Identifier: Apache-2.0
// The kernels of each instruction set, and the choice between them at run time.
#pragma once

#include <string>
#include <vector>

#include "conv_kernels.h"
#include "depthwise_kernels.h"
#include "prune_kernels.h"

namespace sparsebwd {

// One instruction set: its name as SPARSEBWD_MAX_ISA spells it, and its kernels.
struct IsaKernels {
  const char* name;
  const PruneKernels& prune;
  const ConvKernels& conv;
  const DepthwiseKernels& depthwise;
};

// The kernels to use: those of the best instruction set that this CPU runs and that
// SPARSEBWD_MAX_ISA (a name of one that this build has; read once) allows. Throws std::invalid_argument if
// that variable holds anything else.
const IsaKernels& active_kernels();

// Those of the instruction sets that this build has and this CPU runs, lowest first.
std::vector<const IsaKernels*> supported_kernels();

}  // namespace sparsebwd
