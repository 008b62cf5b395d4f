// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution kernels: AVX2.
#include "vec_avx2.h"

#include "depthwise_kernels.inl"

const sparsebwd::DepthwiseKernels sparsebwd::depthwise_kernels_avx2 = sparsebwd::kDepthwiseKernels;
