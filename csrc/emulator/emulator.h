// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on a CPU, to test them where there is no GPU. device.cuh includes this file in
// place of CUDA's headers; the kernels are then plain C++ for any compiler.
//
// How it works. Each CUDA thread is a fibre: a stack of its own, that gives way to another at
// barriers and warp intrinsics, never elsewhere. The next one to run is drawn at random from a seed
// (set_seed), so that what a missing barrier leaves open goes one way and the other. Blocks of an
// ordinary launch run one after another, in random order; those of a cooperative launch are all
// alive at once. A launch has ended when it returns.
//
// What it checks, besides giving results. Every rule that the CUDA manual states for the calls
// below: masks that name the caller, lanes that are there and call the same, barriers that all
// threads reach, copies waited for, limits of launches. What breaks one ends the launch with an
// exception that names kernel, block, thread and place. If no thread can go on, that is a deadlock
// and reported as one. Shared memory is as large as asked, filled with NaNs before each block.
//
// docs/emulator.md says how to use it. The checked build (tests/emulation.py) compiles kernels with
// -fsanitize=thread,undefined but links neither library: the runtime defines the functions that
// instrumented code calls (checks.cpp), and so sees each memory access. It refuses those that are
// outside the operands, the block's shared memory and the thread's own stack, misaligned, of memory
// that nothing was written to, or that race: two threads, one of them writing, no barrier between.
// Undefined arithmetic is refused too.
//
// What is not emulated: tensor cores, TMA, clusters, textures, memory order weaker than sequential
// consistency, time. A launch needs as many registers as it likes.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- vectors

#define SPARSEBWD_VECTOR(type, name)                                                     \
  struct name##1 { type x; };                                                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct name##3 { type x, y, z; };                                                      \
  struct alignas(sizeof(type) < 4 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##1 make_##name##1(type x) { return {x}; }                                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SPARSEBWD_VECTOR(signed char, char)
SPARSEBWD_VECTOR(unsigned char, uchar)
SPARSEBWD_VECTOR(short, short)
SPARSEBWD_VECTOR(unsigned short, ushort)
SPARSEBWD_VECTOR(int, int)
SPARSEBWD_VECTOR(unsigned, uint)
SPARSEBWD_VECTOR(long long, longlong)
SPARSEBWD_VECTOR(unsigned long long, ulonglong)
SPARSEBWD_VECTOR(float, float)
SPARSEBWD_VECTOR(double, double)
#undef SPARSEBWD_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Variables that the runtime sets when another fibre goes on; constants to kernels.
#ifndef SPARSEBWD_EMULATOR_RUNTIME
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
#endif
constexpr int warpSize = 32;

// ---- what the runtime offers (fibres.h says which file does what)

namespace sparsebwd::cuda::emulator {

// T, where the compiler is not to deduce it.
template <class T>
using Same = std::common_type_t<T>;

// Where in the source a call is.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The emulated device.
struct Limits {
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
  int cooperative;  // whether it takes cooperative launches
};
Limits& device();

// The order of threads and blocks in all launches from here on follows from the seed.
void set_seed(uint64_t seed);

// Memory that kernels may access in the checked build, until clear_buffers().
void add_buffer(const void* begin, size_t bytes, const char* name, bool writable, bool initialised);
void clear_buffers();

// The first mistake that the checked build found in the kernels' host code since the last call, or
// empty.
std::string take_host_error();

// Ends the launch with an exception.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* shared_memory();

struct Votes {
  int count, any, all;
};
Votes block_barrier(bool predicate, Site site);
void group_barrier(int id, int threads, Site site);
void grid_barrier(Site site);
void fence();
void pause();

enum class WarpCall {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kMatchAny,
  kMatchAll,
  kAddUnsigned,
  kMinUnsigned,
  kMaxUnsigned,
  kMinSigned,
  kMaxSigned,
  kAnd,
  kOr,
  kXor,
};
struct Lane {
  uint64_t value;  // operand, then result
  int argument = 0, width = 32;  // of shuffles
};
// The lanes of the mask exchange what they bring.
uint64_t warp_call(WarpCall call, uint32_t mask, Lane lane, Site site);
unsigned lane_number();

enum class AtomicCall {
  kAdd,
  kExchange,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kIncrement,
  kDecrement,
  kCompareAndSwap,
};
template <class T>
T atomic(AtomicCall call, T* address, T value, T compare = T());

void copy_async(void* shared, const void* global, int bytes, Site site);
void commit_copies();
void wait_for_copies(int groups);

// A launch, its arguments still with their types inside `call`.
struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared;
  bool cooperative;
  void (*call)(const void* arguments);
  const void* arguments;
  size_t argument_bytes;
};
cudaError_t run(const Launch& launch);
cudaError_t resident_blocks(int threads, size_t shared, int* blocks);

template <class... Parameters, class Shape, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t,
                   Arguments... arguments) {
  using Call = std::tuple<void (*)(Parameters...), Parameters...>;
  const Call call(kernel, static_cast<Parameters>(arguments)...);
  const auto apply = [](const void* call) {
    std::apply([](auto kernel, const auto&... values) { kernel(values...); },
               *static_cast<const Call*>(call));
  };
  return run({reinterpret_cast<const void*>(kernel), shape.grid, shape.block, shape.shared,
              shape.cooperative, apply, &call, sizeof call});
}

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(From) <= sizeof(To) && std::is_trivially_copyable_v<From>);
  To result = {};
  memcpy(&result, &value, sizeof value);
  return result;
}

template <class T>
inline T low_bits_as(uint64_t bits) {
  T result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

template <class T>
inline T shuffle(WarpCall call, unsigned mask, T value, int argument, int width, Site site) {
  return low_bits_as<T>(warp_call(call, mask, {bits_as<uint64_t>(value), argument, width}, site));
}

}  // namespace sparsebwd::cuda::emulator

// ---- the names of device.cuh

namespace sparsebwd::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }

inline void grid_sync(emulator::Site site = emulator::Site::here()) {
  emulator::grid_barrier(site);
}

inline void named_barrier(int id, int threads, emulator::Site site = emulator::Site::here()) {
  emulator::group_barrier(id, threads, site);
}

inline unsigned char* in_register(unsigned char* shared) { return shared; }
inline uint64_t in_register(uint64_t value) { return value; }

inline void cp_async16(void* shared, const void* global, int bytes = 16,
                       emulator::Site site = emulator::Site::here()) {
  emulator::copy_async(shared, global, bytes, site);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int Groups>
inline void cp_async_wait() {
  emulator::wait_for_copies(Groups);
}

}  // namespace sparsebwd::cuda

// ---- the names of CUDA C++

#define SPARSEBWD_SITE \
  sparsebwd::cuda::emulator::Site site = sparsebwd::cuda::emulator::Site::here()

inline void __syncthreads(SPARSEBWD_SITE) { sparsebwd::cuda::emulator::block_barrier(true, site); }
inline int __syncthreads_count(int predicate, SPARSEBWD_SITE) {
  return sparsebwd::cuda::emulator::block_barrier(predicate, site).count;
}
inline int __syncthreads_or(int predicate, SPARSEBWD_SITE) {
  return sparsebwd::cuda::emulator::block_barrier(predicate, site).any;
}
inline int __syncthreads_and(int predicate, SPARSEBWD_SITE) {
  return sparsebwd::cuda::emulator::block_barrier(predicate, site).all;
}

inline void __threadfence_block() { sparsebwd::cuda::emulator::fence(); }
inline void __threadfence() { sparsebwd::cuda::emulator::fence(); }
inline void __threadfence_system() { sparsebwd::cuda::emulator::fence(); }
inline void __nanosleep(unsigned) { sparsebwd::cuda::emulator::pause(); }
[[noreturn]] inline void __trap() { sparsebwd::cuda::emulator::fail("__trap()"); }

inline void __syncwarp(unsigned mask = ~0u, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  warp_call(WarpCall::kSync, mask, {0}, site);
}
// Which lanes run together is up to the hardware; here each runs alone.
inline unsigned __activemask() { return 1u << sparsebwd::cuda::emulator::lane_number(); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  return shuffle(WarpCall::kShuffle, mask, value, lane, width, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  return shuffle(WarpCall::kShuffleUp, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  return shuffle(WarpCall::kShuffleDown, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  return shuffle(WarpCall::kShuffleXor, mask, value, lanes, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  return static_cast<unsigned>(warp_call(WarpCall::kBallot, mask, {predicate != 0}, site));
}
inline int __any_sync(unsigned mask, int predicate, SPARSEBWD_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SPARSEBWD_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  return static_cast<unsigned>(
      warp_call(WarpCall::kMatchAny, mask, {bits_as<uint64_t>(value)}, site));
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T value, int* same, SPARSEBWD_SITE) {
  using namespace sparsebwd::cuda::emulator;
  const auto lanes =
      static_cast<unsigned>(warp_call(WarpCall::kMatchAll, mask, {bits_as<uint64_t>(value)}, site));
  *same = lanes != 0;
  return lanes;
}

#define SPARSEBWD_REDUCE(name, type, call)                                                       \
  inline type name(unsigned mask, type value, SPARSEBWD_SITE) {                                  \
    using namespace sparsebwd::cuda::emulator;                                                   \
    return static_cast<type>(warp_call(WarpCall::call, mask, {bits_as<uint64_t>(value)}, site)); \
  }
SPARSEBWD_REDUCE(__reduce_add_sync, unsigned, kAddUnsigned)
SPARSEBWD_REDUCE(__reduce_add_sync, int, kAddUnsigned)
SPARSEBWD_REDUCE(__reduce_min_sync, unsigned, kMinUnsigned)
SPARSEBWD_REDUCE(__reduce_min_sync, int, kMinSigned)
SPARSEBWD_REDUCE(__reduce_max_sync, unsigned, kMaxUnsigned)
SPARSEBWD_REDUCE(__reduce_max_sync, int, kMaxSigned)
SPARSEBWD_REDUCE(__reduce_and_sync, unsigned, kAnd)
SPARSEBWD_REDUCE(__reduce_or_sync, unsigned, kOr)
SPARSEBWD_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef SPARSEBWD_REDUCE
#undef SPARSEBWD_SITE

// The second operand has the type of the first, as where CUDA has no templates.
#define SPARSEBWD_ATOMIC(name, call)                                    \
  template <class T>                                                    \
  inline T name(T* address, sparsebwd::cuda::emulator::Same<T> value) { \
    using namespace sparsebwd::cuda::emulator;                          \
    return atomic<T>(AtomicCall::call, address, value);                 \
  }
SPARSEBWD_ATOMIC(atomicAdd, kAdd)
SPARSEBWD_ATOMIC(atomicExch, kExchange)
SPARSEBWD_ATOMIC(atomicMin, kMin)
SPARSEBWD_ATOMIC(atomicMax, kMax)
SPARSEBWD_ATOMIC(atomicAnd, kAnd)
SPARSEBWD_ATOMIC(atomicOr, kOr)
SPARSEBWD_ATOMIC(atomicXor, kXor)
SPARSEBWD_ATOMIC(atomicInc, kIncrement)
SPARSEBWD_ATOMIC(atomicDec, kDecrement)
#undef SPARSEBWD_ATOMIC
template <class T>
inline T atomicSub(T* address, sparsebwd::cuda::emulator::Same<T> value) {
  return atomicAdd(address, static_cast<T>(-value));
}
template <class T>
inline T atomicCAS(T* address, sparsebwd::cuda::emulator::Same<T> compare,
                   sparsebwd::cuda::emulator::Same<T> value) {
  using namespace sparsebwd::cuda::emulator;
  return atomic<T>(AtomicCall::kCompareAndSwap, address, value, compare);
}

// Hints to caches.
#define SPARSEBWD_LOAD(name)        \
  template <class T>                \
  inline T name(const T* address) { \
    return *address;                \
  }
SPARSEBWD_LOAD(__ldg)
SPARSEBWD_LOAD(__ldcg)
SPARSEBWD_LOAD(__ldca)
SPARSEBWD_LOAD(__ldcs)
SPARSEBWD_LOAD(__ldlu)
SPARSEBWD_LOAD(__ldcv)
#undef SPARSEBWD_LOAD
#define SPARSEBWD_STORE(name)                                              \
  template <class T>                                                       \
  inline void name(T* address, sparsebwd::cuda::emulator::Same<T> value) { \
    *address = value;                                                      \
  }
SPARSEBWD_STORE(__stwb)
SPARSEBWD_STORE(__stcg)
SPARSEBWD_STORE(__stcs)
SPARSEBWD_STORE(__stwt)
#undef SPARSEBWD_STORE

#include "intrinsics.h"
