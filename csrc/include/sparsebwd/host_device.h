// SPDX-License-Identifier: Apache-2.0
// Marks functions that kernels call too.
#pragma once

#ifdef __CUDACC__
#define SPARSEBWD_HOST_DEVICE __host__ __device__
#else
#define SPARSEBWD_HOST_DEVICE
#endif
