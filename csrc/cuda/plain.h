// SPDX-License-Identifier: Apache-2.0
// Both convolutions for any problem, strides and element type, `nonzeros` and workspace unused:
// what runs where the sparse kernels refuse. Written to be read, not to be fast.
#pragma once

#include "kernels.h"

namespace sparsebwd::cuda {

cudaError_t agb_plain(const ConvCall& call, cudaStream_t stream);
cudaError_t wgc_plain(const ConvCall& call, cudaStream_t stream);

}  // namespace sparsebwd::cuda
