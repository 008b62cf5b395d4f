// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <utility>

#include "kernels.h"

namespace sparsebwd::cuda {

cudaError_t current_device(Device* device) {
  constexpr int kMostDevices = 64;
  static std::array<Device, kMostDevices> known = {};
  static std::mutex mutex;
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  if (ordinal >= kMostDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& entry = known[ordinal];
  if (entry.multiprocessors == 0) {
    Device found = {};
    const std::pair<int*, cudaDeviceAttr> wanted[] = {
        {&found.multiprocessors, cudaDevAttrMultiProcessorCount},
        {&found.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        {&found.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        {&found.cooperative, cudaDevAttrCooperativeLaunch},
    };
    for (const auto& [value, attribute] : wanted) {
      error = cudaDeviceGetAttribute(value, attribute, ordinal);
      if (error != cudaSuccess) return error;
    }
    entry = found;
  }
  *device = entry;
  return cudaSuccess;
}

}  // namespace sparsebwd::cuda
