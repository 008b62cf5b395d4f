// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution kernels: any machine.
#include "vec_baseline.h"

#include "depthwise_kernels.inl"

const sparsebwd::DepthwiseKernels sparsebwd::depthwise_kernels_baseline =
    sparsebwd::kDepthwiseKernels;
