// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>

namespace sparsebwd::cuda {

// cudaErrorInvalidDevice if there is no kernel of this name.
cudaError_t launch_test_kernel(const char* name, const unsigned (&grid)[3],
                               const unsigned (&block)[3], size_t shared, bool cooperative,
                               const void* in, void* out, int n);

}  // namespace sparsebwd::cuda
