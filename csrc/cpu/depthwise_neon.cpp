// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution kernels: NEON of aarch64.
#include "vec_neon.h"

#include "depthwise_kernels.inl"

const sparsebwd::DepthwiseKernels sparsebwd::depthwise_kernels_neon = sparsebwd::kDepthwiseKernels;
