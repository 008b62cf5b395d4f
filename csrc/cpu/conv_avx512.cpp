// SPDX-License-Identifier: Apache-2.0
// Convolution kernels: AVX-512.
#include "vec_avx512.h"

#include "conv_kernels.inl"

const sparsebwd::ConvKernels sparsebwd::conv_kernels_avx512 = sparsebwd::kConvKernels;
