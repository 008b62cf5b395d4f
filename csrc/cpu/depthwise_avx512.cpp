// SPDX-License-Identifier: Apache-2.0
// Depthwise convolution kernels: AVX-512.
#include "vec_avx512.h"

#include "depthwise_kernels.inl"

const sparsebwd::DepthwiseKernels sparsebwd::depthwise_kernels_avx512 =
    sparsebwd::kDepthwiseKernels;
