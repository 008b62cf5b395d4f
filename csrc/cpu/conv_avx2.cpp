// SPDX-License-Identifier: Apache-2.0
// Convolution kernels: AVX2.
#include "vec_avx2.h"

#include "conv_kernels.inl"

const sparsebwd::ConvKernels sparsebwd::conv_kernels_avx2 = sparsebwd::kConvKernels;
