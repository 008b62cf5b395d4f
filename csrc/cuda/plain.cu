// SPDX-License-Identifier: Apache-2.0
// The plain kernels. Sums are in float64, each by one thread (AGB) or by one block in a fixed order
// (WGC), and zeros of grad_output are skipped. Neighbouring threads take neighbours in memory.
#include <algorithm>

#include "element.cuh"
#include "launch.h"
#include "plain.h"
#include "sparsebwd/integers.h"

namespace sparsebwd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 20;  // of a launch; they take turns where there is more to do

template <class T>
struct Operands {
  ConvProblem problem;
  const T* grad_output;
  Strides grad_output_strides;
  const T* operand;
  Strides operand_strides;
  T* result;
  Strides result_strides;
};

template <class T>
Operands<T> operands_of(const ConvCall& call) {
  return {call.problem,
          static_cast<const T*>(call.grad_output),
          call.grad_output_strides,
          static_cast<const T*>(call.operand),
          call.operand_strides,
          static_cast<T*>(call.result),
          call.result_strides};
}

// The remainder of index by size; index becomes the quotient.
__device__ __forceinline__ int64_t take(int64_t& index, int64_t size) {
  const int64_t quotient = index / size, remainder = index - quotient * size;
  index = quotient;
  return remainder;
}

// Where the window of output position `out` has tap `tap`, in input positions; may be outside.
__device__ __forceinline__ int64_t input_position(int64_t out, int64_t tap, int64_t stride,
                                                  int64_t pad, int64_t dilation) {
  return out * stride - pad + tap * dilation;
}

// The output position whose tap `tap` is at input position `in`, or -1.
__device__ __forceinline__ int64_t output_position(int64_t in, int64_t tap, int64_t stride,
                                                   int64_t pad, int64_t dilation, int64_t size) {
  int64_t position = in + pad - tap * dilation;
  if (position < 0 || take(position, stride) != 0 || position >= size) return -1;
  return position;
}

// A thread for each element of grad_input.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    agb_plain_kernel(Operands<T> op, bool channels_first) {
  const ConvProblem& problem = op.problem;
  const Strides &gs = op.grad_output_strides, &ws = op.operand_strides, &xs = op.result_strides;
  const int64_t height = problem.p(), width = problem.q();
  const int64_t group_c = problem.c / problem.groups, group_k = problem.k / problem.groups;
  const int64_t count = problem.n * problem.c * problem.h * problem.w;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    int64_t n = i, c = 0;
    if (!channels_first) c = take(n, problem.c);
    const int64_t w = take(n, problem.w), h = take(n, problem.h);
    if (channels_first) c = take(n, problem.c);
    const int64_t group = c / group_c;
    double sum = 0;
    for (int64_t r = 0; r < problem.r; ++r) {
      const int64_t p =
          output_position(h, r, problem.stride_h, problem.pad_h, problem.dil_h, height);
      if (p < 0) continue;
      for (int64_t s = 0; s < problem.s; ++s) {
        const int64_t q =
            output_position(w, s, problem.stride_w, problem.pad_w, problem.dil_w, width);
        if (q < 0) continue;
        for (int64_t k = group * group_k; k < (group + 1) * group_k; ++k) {
          const float g = to_float(op.grad_output[n * gs.n + k * gs.c + p * gs.h + q * gs.w]);
          if (g == 0) continue;
          const int64_t tap = k * ws.n + (c - group * group_c) * ws.c + r * ws.h + s * ws.w;
          sum += double(g) * to_float(op.operand[tap]);
        }
      }
    }
    op.result[n * xs.n + c * xs.c + h * xs.h + w * xs.w] = from_float<T>(static_cast<float>(sum));
  }
}

// A block for each k, tap and run of `lanes` channels: its threads are lanes x pixels, and the sums
// over pixels are added up in shared memory. lanes is a power of 2.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) wgc_plain_kernel(Operands<T> op, int lanes) {
  const ConvProblem& problem = op.problem;
  const Strides &gs = op.grad_output_strides, &xs = op.operand_strides, &ws = op.result_strides;
  double* sums = reinterpret_cast<double*>(dynamic_shared());
  const int thread = threadIdx.x, lane = thread % lanes;
  const int64_t height = problem.p(), width = problem.q(), pixels = problem.n * height * width;
  const int64_t group_c = problem.c / problem.groups, group_k = problem.k / problem.groups;
  const int64_t runs = ceil_div(group_c, lanes);
  const int64_t jobs = problem.k * problem.r * problem.s * runs;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    int64_t k = job;
    const int64_t c = take(k, runs) * lanes + lane;
    const int64_t s = take(k, problem.s), r = take(k, problem.r);
    double sum = 0;
    for (int64_t pixel = thread / lanes; c < group_c && pixel < pixels; pixel += kThreads / lanes) {
      int64_t n = pixel;
      const int64_t q = take(n, width), p = take(n, height);
      const int64_t w = input_position(q, s, problem.stride_w, problem.pad_w, problem.dil_w);
      const int64_t h = input_position(p, r, problem.stride_h, problem.pad_h, problem.dil_h);
      if (w < 0 || w >= problem.w || h < 0 || h >= problem.h) continue;
      const float g = to_float(op.grad_output[n * gs.n + k * gs.c + p * gs.h + q * gs.w]);
      if (g == 0) continue;
      const int64_t channel = k / group_k * group_c + c;
      sum += double(g) * to_float(op.operand[n * xs.n + channel * xs.c + h * xs.h + w * xs.w]);
    }
    sums[thread] = sum;
    for (int half = kThreads / 2; half >= lanes; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread < lanes && c < group_c) {
      op.result[k * ws.n + c * ws.c + r * ws.h + s * ws.w] =
          from_float<T>(static_cast<float>(sums[thread]));
    }
    __syncthreads();  // the sums are read before the next job overwrites them
  }
}

unsigned blocks_for(int64_t wanted) {
  return static_cast<unsigned>(std::min(std::max<int64_t>(wanted, 0), kMostBlocks));
}

}  // namespace

cudaError_t agb_plain(const ConvCall& call, cudaStream_t stream) {
  const ConvProblem& problem = call.problem;
  const int64_t count = problem.n * problem.c * problem.h * problem.w;
  const bool channels_first = call.result_strides.w < call.result_strides.c;
  return with_element(call.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const LaunchShape shape = {blocks_for(ceil_div(count, kThreads)), kThreads};
    return launch(agb_plain_kernel<T>, shape, stream, operands_of<T>(call), channels_first);
  });
}

cudaError_t wgc_plain(const ConvCall& call, cudaStream_t stream) {
  const ConvProblem& problem = call.problem;
  const int64_t group_c = problem.c / problem.groups;
  const bool channels_first = call.operand_strides.w < call.operand_strides.c;
  const int64_t pixels = problem.n * problem.p() * problem.q();
  const int wanted = channels_first ? 1 : 32;  // or more, if there are few pixels
  int lanes = 1;
  while (lanes < group_c && lanes < kThreads && (lanes < wanted || lanes * pixels < kThreads))
    lanes *= 2;
  const int64_t runs = ceil_div(group_c, lanes);
  return with_element(call.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const LaunchShape shape = {blocks_for(problem.k * problem.r * problem.s * runs), kThreads,
                               kThreads * sizeof(double)};
    return launch(wgc_plain_kernel<T>, shape, stream, operands_of<T>(call), lanes);
  });
}

}  // namespace sparsebwd::cuda
