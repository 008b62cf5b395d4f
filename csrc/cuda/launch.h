// SPDX-License-Identifier: Apache-2.0
// Kernel launches as function calls that check their arguments: plain C++, no <<< >>>.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "kernels.h"

namespace sparsebwd::cuda {

// What the memory that the L1 cache and shared memory divide is to be, beyond what a block asks for:
// as the driver likes, cache, or shared memory for several blocks.
enum class Prefers { kNothing, kCache, kShared };

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared = 0;         // bytes of dynamic shared memory
  bool cooperative = false;  // all blocks resident at once, as grid_sync() needs
  Prefers prefers = Prefers::kNothing;
};

#ifdef SPARSEBWD_EMULATOR

using emulator::launch;

#else

// Allows the kernel more shared memory than the 48 KB that any may have: as much as there is but
// for what compilers may count as the kernel's own, since what is allowed holds for all launches,
// those of other threads and of graphs too.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  constexpr int kReserved = 1024;
  const int wanted = static_cast<int>(bytes);
  if (wanted + kReserved <= 48 * 1024) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              std::max(wanted, device.shared_per_block - kReserved));
}

// Starts kernel(arguments...) on the stream. An empty grid starts nothing.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return cudaSuccess;
  cudaError_t error = allow_shared(kernel, shape.shared);
  // Else the multiprocessors may stay divided as the kernel before needed it.
  if (error == cudaSuccess && shape.prefers != Prefers::kNothing)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributePreferredSharedMemoryCarveout,
                                 shape.prefers == Prefers::kCache ? cudaSharedmemCarveoutMaxL1
                                                                  : cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#endif

// Whether vectors of so many bytes can be loaded from there.
inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace sparsebwd::cuda
