// SPDX-License-Identifier: Apache-2.0
// Convolution kernels: any machine.
#include "vec_baseline.h"

#include "conv_kernels.inl"

const sparsebwd::ConvKernels sparsebwd::conv_kernels_baseline = sparsebwd::kConvKernels;
