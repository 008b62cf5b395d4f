// SPDX-License-Identifier: Apache-2.0
// Convolution kernels: NEON of aarch64.
#include "vec_neon.h"

#include "conv_kernels.inl"

const sparsebwd::ConvKernels sparsebwd::conv_kernels_neon = sparsebwd::kConvKernels;
