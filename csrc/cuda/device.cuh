// SPDX-License-Identifier: Apache-2.0
// What kernels use of the hardware beyond CUDA C++: shared memory, barriers, and every line of PTX
// but for the few on element types (element.cuh). Kernels include this file and no other CUDA
// header, so that the emulator (csrc/emulator), which compiles the same kernels for a CPU, has one
// thing to stand in for.
#pragma once

#include <stdint.h>

#ifdef SPARSEBWD_EMULATOR

#include "emulator.h"  // the same names, and CUDA's own: threadIdx, __shfl_sync, atomicAdd, ...

#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace sparsebwd::cuda {

// The block's dynamic shared memory, the only kind that kernels here use; 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared[];
  return shared;
}

// A barrier for all threads of a cooperative launch, that also orders their memory accesses.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// A barrier for `threads` threads of the block, whole warps, that name the same `id` from 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A pointer to shared memory, computed here and kept in a register. Compilers would rather compute it
// again, at four instructions, wherever it is used.
__device__ __forceinline__ unsigned char* in_register(unsigned char* shared) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}

// The same of any number.
__device__ __forceinline__ uint64_t in_register(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

// Copies 16 bytes from global to shared memory, of which the last 16 - `bytes` are zeros. Both
// addresses are 16-byte aligned. The copy is there after the cp_async_wait of its group and a barrier.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Groups` of this thread's committed groups are under way.
template <int Groups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

}  // namespace sparsebwd::cuda

#endif
