// SPDX-License-Identifier: Apache-2.0
// Kernels that test the emulator. Most come in pairs: one as it should be, and one with a mistake
// that the emulator must find. All take the same arguments; `in` and `out` are what a test makes of
// them.
#include "emulator_kernels.h"

#include <string.h>

#include "launch.h"

namespace sparsebwd::cuda {
namespace {

constexpr unsigned kAll = ~0u;

struct Arguments {
  const void* in;
  void* out;
  int n;
};

// A mistake outside kernels.
int overflowing(int n) { return n + 2'000'000'000; }

template <class T>
__device__ const T* in(const Arguments& a) {
  return static_cast<const T*>(a.in);
}
template <class T>
__device__ T* out(const Arguments& a) {
  return static_cast<T*>(a.out);
}
template <class T>
__device__ T* shared() {
  return reinterpret_cast<T*>(dynamic_shared());
}

// ---- out[0] = sum of n floats, by one block

__global__ void sum_by_shuffles(Arguments a) {
  float sum = 0;
  for (int i = threadIdx.x; i < a.n; i += blockDim.x) sum += in<float>(a)[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) shared<float>()[warp] = sum;
  __syncthreads();
  if (warp > 0) return;
  sum = lane < warps ? shared<float>()[lane] : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(kAll, sum, lanes);
  if (lane == 0) out<float>(a)[0] = sum;
}

template <bool Waits>
__global__ void sum_in_shared(Arguments a) {
  float* sums = shared<float>();
  const int thread = threadIdx.x;
  sums[thread] = thread < a.n ? in<float>(a)[thread] : 0;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    if (Waits) __syncthreads();
  }
  if (thread == 0) out<float>(a)[0] = sums[0];
}

__global__ void sum_by_atomics(Arguments a) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.n; i += gridDim.x * blockDim.x)
    atomicAdd(out<float>(a), in<float>(a)[i]);
}

template <bool Atomic>
__global__ void count(Arguments a) {
  if (Atomic) {
    atomicAdd(out<int>(a), 1);
  } else {
    out<int>(a)[0] += 1;
  }
}

// ---- out[i] = in[0] + ... + in[i]

template <bool Waits>
__global__ void scan(Arguments a) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int value = thread < a.n ? in<int>(a)[thread] : 0;
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const int other = __shfl_up_sync(kAll, value, delta);
    if (lane >= static_cast<int>(delta)) value += other;
  }
  if (lane == 31) shared<int>()[warp] = value;
  if (Waits) __syncthreads();
  for (int i = 0; i < warp; ++i) value += shared<int>()[i];
  if (thread < a.n) out<int>(a)[thread] = value;
}

// ---- out[tile][i] = in[tile][last - i], a tile at a time through the same shared memory

template <bool WaitsAtTheEnd>
__global__ void reverse_tiles(Arguments a) {
  const int size = blockDim.x, thread = threadIdx.x;
  for (int tile = 0; tile < a.n; ++tile) {
    shared<int>()[thread] = in<int>(a)[tile * size + thread];
    __syncthreads();
    out<int>(a)[tile * size + thread] = shared<int>()[size - 1 - thread];
    if (WaitsAtTheEnd) __syncthreads();
  }
}

// The same within warps.
template <bool Waits>
__global__ void reverse_warps(Arguments a) {
  const int thread = threadIdx.x;
  shared<int>()[thread] = in<int>(a)[thread];
  if (Waits) __syncwarp();
  out<int>(a)[thread] = shared<int>()[thread ^ 31];
}

// Two copies are under way: while a tile is used, the next one is brought.
template <bool Waits, bool WaitsAtTheEnd = true>
__global__ void reverse_tiles_async(Arguments a) {
  const int size = 4 * blockDim.x, thread = threadIdx.x;
  int* buffers = shared<int>();
  const auto bring = [&](int tile) {
    if (tile < a.n)
      cp_async16(buffers + tile % 2 * size + 4 * thread, in<int>(a) + tile * size + 4 * thread);
    cp_async_commit();
  };
  bring(0);
  for (int tile = 0; tile < a.n; ++tile) {
    bring(tile + 1);
    if (Waits) cp_async_wait<1>();
    __syncthreads();
    for (int i = thread; i < size; i += blockDim.x)
      out<int>(a)[tile * size + i] = buffers[tile % 2 * size + size - 1 - i];
    if (WaitsAtTheEnd) __syncthreads();
  }
}

// Copies n bytes of 16, the rest are zeros.
__global__ void copy_part(Arguments a) {
  cp_async16(shared<int>(), a.in, a.n);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) out<int>(a)[i] = shared<int>()[i];
}

// ---- one half of the block hands numbers to the other

template <int ThreadsOfSecond>
__global__ void hand_over(Arguments a) {
  const int thread = threadIdx.x, half = blockDim.x / 2, all = blockDim.x;
  if (thread < half) {
    for (int i = 0; i < a.n; ++i) {
      if (i > 0) named_barrier(2, all);  // the last number was taken
      shared<int>()[thread] = in<int>(a)[i * half + thread];
      named_barrier(1, all);
    }
  } else {
    for (int i = 0; i < a.n; ++i) {
      named_barrier(1, ThreadsOfSecond ? ThreadsOfSecond : all);
      out<int>(a)[i * half + thread - half] = shared<int>()[all - 1 - thread];
      if (i + 1 < a.n) named_barrier(2, all);
    }
  }
}

__global__ void number_a_barrier(Arguments a) { named_barrier(a.n, 32); }

// ---- lanes

struct Votes {
  unsigned ballot, match, match_all, sum, least, most, bits_and, bits_or, bits_xor;
  int any, all, count, or_, and_, from_seven, signed_least;
};

__global__ void vote(Arguments a) {
  const int thread = threadIdx.x;
  const int value = in<int>(a)[thread];
  const unsigned bits = static_cast<unsigned>(value);
  Votes votes;
  int same = 0;
  votes.ballot = __ballot_sync(kAll, value > 0);
  votes.any = __any_sync(kAll, value > 2);
  votes.all = __all_sync(kAll, value > 0);
  votes.match = __match_any_sync(kAll, value);
  votes.match_all = __match_all_sync(kAll, value, &same);
  votes.sum = __reduce_add_sync(kAll, bits);
  votes.least = __reduce_min_sync(kAll, bits);
  votes.most = __reduce_max_sync(kAll, bits);
  votes.signed_least = __reduce_min_sync(kAll, value);
  votes.bits_and = __reduce_and_sync(kAll, bits);
  votes.bits_or = __reduce_or_sync(kAll, bits);
  votes.bits_xor = __reduce_xor_sync(kAll, bits);
  votes.from_seven = __shfl_sync(kAll, value, 7, 8);
  votes.count = __syncthreads_count(value > 0);
  votes.or_ = __syncthreads_or(value > 2) != 0;
  votes.and_ = __syncthreads_and(value > 0) != 0;
  out<Votes>(a)[thread] = votes;
}

// Lanes 0 to n - 1 of each warp add up what they have.
template <bool RightMask>
__global__ void sum_some_lanes(Arguments a) {
  const int lane = threadIdx.x % 32;
  if (lane >= a.n) return;
  const unsigned some = (1u << a.n) - 1;
  out<int>(a)[threadIdx.x] =
      static_cast<int>(__reduce_add_sync(RightMask ? some : kAll, in<int>(a)[threadIdx.x]));
}

// Each half of a warp on its own; one of them in another order than the other.
__global__ void sum_halves(Arguments a) {
  const int thread = threadIdx.x;
  const bool high = thread % 32 >= 16;
  const unsigned half = high ? 0xFFFF0000u : 0x0000FFFFu;
  int value = in<int>(a)[thread];
  if (high) __syncwarp(half);
  for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(half, value, lanes);
  out<int>(a)[thread] = value;
}

enum class Mistake { kNotInMask, kReadsOutside, kOtherMask, kOtherCall, kWidth };

template <Mistake M>
__global__ void wrong_mask(Arguments a) {
  const int lane = threadIdx.x % 32;
  int value = lane;
  if (M == Mistake::kNotInMask) value = __shfl_sync(0xFFFFu, value, 0);
  if (M == Mistake::kReadsOutside && lane < 16) value = __shfl_sync(0xFFFFu, value, 20);
  if (M == Mistake::kOtherMask) value = __shfl_sync(lane < 16 ? kAll : kAll >> 1, value, 0);
  if (M == Mistake::kOtherCall)
    value = lane < 16 ? __shfl_sync(kAll, value, 0) : __any_sync(kAll, value);
  if (M == Mistake::kWidth) value = __shfl_sync(kAll, value, 0, 12);
  out<int>(a)[threadIdx.x] = value;
}

// ---- barriers that not all reach

// An exit before a barrier is allowed.
__global__ void some_return(Arguments a) {
  if (static_cast<int>(threadIdx.x) >= a.n) return;
  shared<int>()[threadIdx.x] = in<int>(a)[threadIdx.x];
  __syncthreads();
  out<int>(a)[threadIdx.x] = shared<int>()[a.n - 1 - threadIdx.x];
}

__global__ void divergent_barrier(Arguments a) {
  if (static_cast<int>(threadIdx.x) < a.n) {
    __syncthreads();
    out<int>(a)[threadIdx.x] = 1;
  }
  __syncthreads();
}

__global__ void deadlock(Arguments a) {
  if (static_cast<int>(threadIdx.x) < a.n) {
    named_barrier(1, 2 * a.n);
  } else {
    __syncthreads();
  }
}

// Waits for a flag that another thread sets.
template <bool Sets>
__global__ void poll(Arguments a) {
  unsigned* flag = out<unsigned>(a);
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(100);
  } else if (Sets && threadIdx.x == 40) {
    atomicExch(flag, 1u);
  }
}

// ---- the grid: out[i] = sum of in over all blocks

template <bool Waits>
__global__ void sum_of_grid(Arguments a) {
  int* sums = out<int>(a) + gridDim.x;
  const int value = __syncthreads_count(in<int>(a)[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) sums[blockIdx.x] = value;
  if (Waits) grid_sync();
  if (threadIdx.x > 0) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += sums[i];
  out<int>(a)[blockIdx.x] = sum;
}

// The block that finishes last adds up what the others left.
__global__ void last_block_sums(Arguments a) {
  int* sums = out<int>(a) + 2;
  unsigned* finished = out<unsigned>(a) + 1;
  const int value = __syncthreads_count(in<int>(a)[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x > 0) return;
  sums[blockIdx.x] = value;
  __threadfence();
  if (atomicInc(finished, gridDim.x - 1) != gridDim.x - 1) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += sums[i];
  out<int>(a)[0] = sum;
}

// ---- memory

enum class Place { kBelow, kAbove, kFarAbove, kNull, kInput };

// Each thread copies an int; thread 0 also writes one where it may not.
template <Place P>
__global__ void write_global(Arguments a) {
  out<int>(a)[threadIdx.x] = in<int>(a)[threadIdx.x];
  if (threadIdx.x > 0) return;
  if (P == Place::kBelow) out<int>(a)[-1] = 1;
  if (P == Place::kAbove) out<int>(a)[a.n] = 1;
  // 16 TB: no other array can be there.
  if (P == Place::kFarAbove) out<int>(a)[a.n + (int64_t{1} << 42)] = 1;
  if (P == Place::kNull)
    *reinterpret_cast<volatile int*>(static_cast<uintptr_t>(a.n - blockDim.x)) = 1;
  if (P == Place::kInput) const_cast<int*>(in<int>(a))[0] = 1;
}

template <bool Bounded>
__global__ void copy_global(Arguments a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (Bounded && i >= a.n) return;
  out<int>(a)[i] = in<int>(a)[i];
}

// out[i] = in[i + 1], in[0] at the end, through n ints of shared memory.
template <bool Bounded>
__global__ void rotate(Arguments a) {
  const int thread = threadIdx.x;
  shared<int>()[thread] = in<int>(a)[thread];
  __syncthreads();
  const int next = thread + 1;
  out<int>(a)[thread] = shared<int>()[Bounded && next == a.n ? 0 : next];
}

template <bool Bounded>
__global__ void fill_shared(Arguments a) {
  const int thread = threadIdx.x;
  if (!Bounded || thread < a.n) shared<int>()[thread] = thread;
  __syncthreads();
  if (thread < a.n) out<int>(a)[thread] = shared<int>()[a.n - 1 - thread];
}

template <bool Initialises>
__global__ void histogram(Arguments a) {
  int* bins = shared<int>();
  if (Initialises && threadIdx.x < 8) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(bins + in<int>(a)[threadIdx.x], 1);
  __syncthreads();
  if (threadIdx.x < 8) out<int>(a)[threadIdx.x] = bins[threadIdx.x];
}

// Adds to what nobody wrote before, or writes.
template <bool Writes>
__global__ void accumulate(Arguments a) {
  if (Writes) {
    out<int>(a)[threadIdx.x] = in<int>(a)[threadIdx.x];
  } else {
    out<int>(a)[threadIdx.x] += in<int>(a)[threadIdx.x];
  }
}

// Copies floats by fours from `n` floats after the start on.
__global__ void copy_vectors(Arguments a) {
  const auto* from = reinterpret_cast<const float4*>(in<float>(a) + a.n);
  out<float4>(a)[threadIdx.x] = from[threadIdx.x];
}

__device__ int looked_up(int index) {
  const int table[4] = {3, 1, 4, 1};
  return table[index];
}

__global__ void look_up(Arguments a) {
  out<int>(a)[threadIdx.x] = looked_up(in<int>(a)[threadIdx.x]);
}

__device__ __attribute__((noinline)) void fill(int* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = i;
}

// Uses n elements of a local array of 8.
__global__ void fill_local(Arguments a) {
  int local[8];
  fill(local, a.n);
  out<int>(a)[threadIdx.x] = local[threadIdx.x % 8];
}

__global__ void shift(Arguments a) { out<int>(a)[threadIdx.x] = 1 << in<int>(a)[threadIdx.x]; }

// ---- arithmetic: words of `in`, results in the order of the code

__global__ void arithmetic(Arguments a) {
  const unsigned x = in<unsigned>(a)[0], y = in<unsigned>(a)[1];
  const unsigned results[] = {static_cast<unsigned>(__popc(x)),
                              static_cast<unsigned>(__ffs(static_cast<int>(x))),
                              static_cast<unsigned>(__clz(static_cast<int>(x))),
                              __brev(x),
                              __umulhi(x, y),
                              __funnelshift_l(x, y, 5),
                              __funnelshift_r(x, y, 5),
                              __byte_perm(x, y, 0x5140u),
                              __vmaxu2(x, y),
                              min(x, y),
                              max(x, y),
                              __float_as_uint(__fmaf_rn(1.5f, 2.0f, -0.5f)),
                              static_cast<unsigned>(__fns(x, 0, 2))};
  for (unsigned i = 0; i < sizeof results / sizeof *results; ++i) out<unsigned>(a)[i] = results[i];
}

// Where threads and blocks are: out[linear] = x + 10 y + 100 z of the thread, + 1000 times the
// block's.
__global__ void indices(Arguments a) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out<int>(a)[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z +
                       1000 * (blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z));
}

// The order in which threads took a number.
__global__ void order(Arguments a) {
  unsigned* next = shared<unsigned>();
  if (threadIdx.x == 0) *next = 0;
  __syncthreads();
  out<unsigned>(a)[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1u);
}

struct Entry {
  const char* name;
  void (*kernel)(Arguments);
};

const Entry kKernels[] = {
    {"sum_by_shuffles", sum_by_shuffles},
    {"sum_in_shared", sum_in_shared<true>},
    {"sum_in_shared, no barrier in the loop", sum_in_shared<false>},
    {"sum_by_atomics", sum_by_atomics},
    {"count", count<true>},
    {"count, not atomic", count<false>},
    {"scan", scan<true>},
    {"scan, no barrier", scan<false>},
    {"reverse_tiles", reverse_tiles<true>},
    {"reverse_tiles, no barrier at the end of the loop", reverse_tiles<false>},
    {"reverse_warps", reverse_warps<true>},
    {"reverse_warps, no barrier", reverse_warps<false>},
    {"reverse_tiles_async", reverse_tiles_async<true>},
    {"reverse_tiles_async, no wait", reverse_tiles_async<false>},
    {"reverse_tiles_async, no barrier at the end", reverse_tiles_async<true, false>},
    {"copy_part", copy_part},
    {"hand_over", hand_over<0>},
    {"hand_over, other number of threads", hand_over<32>},
    {"number_a_barrier", number_a_barrier},
    {"vote", vote},
    {"sum_some_lanes", sum_some_lanes<true>},
    {"sum_some_lanes, full mask", sum_some_lanes<false>},
    {"sum_halves", sum_halves},
    {"wrong_mask, without the caller", wrong_mask<Mistake::kNotInMask>},
    {"wrong_mask, reads another lane", wrong_mask<Mistake::kReadsOutside>},
    {"wrong_mask, different masks", wrong_mask<Mistake::kOtherMask>},
    {"wrong_mask, different calls", wrong_mask<Mistake::kOtherCall>},
    {"wrong_mask, width", wrong_mask<Mistake::kWidth>},
    {"some_return", some_return},
    {"divergent_barrier", divergent_barrier},
    {"deadlock", deadlock},
    {"poll", poll<true>},
    {"poll, never set", poll<false>},
    {"sum_of_grid", sum_of_grid<true>},
    {"sum_of_grid, no barrier", sum_of_grid<false>},
    {"last_block_sums", last_block_sums},
    {"write_global, below", write_global<Place::kBelow>},
    {"write_global, above", write_global<Place::kAbove>},
    {"write_global, far above", write_global<Place::kFarAbove>},
    {"write_global, null", write_global<Place::kNull>},
    {"write_global, input", write_global<Place::kInput>},
    {"copy_global", copy_global<true>},
    {"copy_global, no bound", copy_global<false>},
    {"rotate", rotate<true>},
    {"rotate, no bound", rotate<false>},
    {"fill_shared", fill_shared<true>},
    {"fill_shared, no bound", fill_shared<false>},
    {"histogram", histogram<true>},
    {"histogram, not initialised", histogram<false>},
    {"accumulate", accumulate<true>},
    {"accumulate, not initialised", accumulate<false>},
    {"copy_vectors", copy_vectors},
    {"look_up", look_up},
    {"fill_local", fill_local},
    {"shift", shift},
    {"arithmetic", arithmetic},
    {"indices", indices},
    {"order", order},
};

}  // namespace

cudaError_t launch_test_kernel(const char* name, const unsigned (&grid)[3],
                               const unsigned (&block)[3], size_t shared, bool cooperative,
                               const void* in, void* out, int n) {
  for (const Entry& entry : kKernels) {
    if (strcmp(entry.name, name) != 0) continue;
    if (overflowing(n) == 0) return cudaErrorInvalidValue;
    const LaunchShape shape = {dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                               shared, cooperative};
    return launch(entry.kernel, shape, nullptr, Arguments{in, out, n});
  }
  return cudaErrorInvalidDevice;
}

}  // namespace sparsebwd::cuda
