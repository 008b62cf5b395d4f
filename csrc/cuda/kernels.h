// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels as the host sees them: raw device pointers, sizes, a stream. Nothing here waits
// for the device or allocates: what a call needs beside its operands is `workspace`, of as many
// bytes as the function beside it says, aligned to 256 bytes, with any contents. Each returns
// cudaSuccess, cudaErrorInvalidValue for what it does not take, or what the launch reported.
// Launches can be captured in graphs.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "sparsebwd/conv_problem.h"
#include "sparsebwd/dtype.h"
#include "sparsebwd/prune.h"

namespace sparsebwd::cuda {

// What launch shapes depend on.
struct Device {
  int multiprocessors;
  int shared_per_block;  // bytes that a block may have at most, opted in to
  int shared_per_multiprocessor;
  // Whether K1 may be one cooperative launch, for which all multiprocessors have to be free. Else it
  // is several, with the same results. At first what the device can do.
  int cooperative;
};

// The current device. Asks the driver once for each device.
cudaError_t current_device(Device* device);

// ---- K1: prune.cu

struct Pruning {
  const int64_t* key;         // two words, in device memory: read when the kernel runs
  double sigma_coefficient;   // sigma = float32(sigma_coefficient * (sum |g| / count))
  // tau = float32(sigma * quantile), then rounded to the dtype of g; 0 if it is not finite.
  double quantile;
  // Null: the threshold is that of this very gradient. Else device memory, 1 + kSigmaHistory words:
  // how many values were recorded so far, then the last kSigmaHistory of them as float32 bits,
  // value i at i % kSigmaHistory. The threshold then comes from the mean of those recorded
  // (summed in float64, in the order of their places, rounded to float32) if there is one and it
  // is above 0, else from this very gradient; sigma of this gradient is recorded afterwards if it
  // is finite and above 0.
  int32_t* sigma_history;
  // Null: all images have this threshold. Else device memory, one for each image: its threshold is that, float32(tau *
  // scale), rounded to the dtype of g; 0 if it is not finite.
  const float* scales;
};

struct PruneCall {
  const void* g;
  DType dtype;
  PruneShape shape;        // of sizes below 2^31
  const Pruning* pruning;  // null: nothing is pruned, g is copied
  void* out;               // pruned g; same dtype and layout; may be g; null: not wanted
  // Null or, channels-last only, [n * h * w][ceil(c / 32)]: bit c % 32 of word c / 32 says whether
  // the (pruned) element is not zero, which holds for a NaN. Bits from c on are 0.
  uint32_t* nonzeros;
  float* stats;  // three, in device memory: tau, sigma (of this gradient), density
  void* workspace;
};

size_t prune_workspace(const PruneCall& call, const Device& device);
cudaError_t prune(const PruneCall& call, const Device& device, cudaStream_t stream);

// ---- K2: agb.cu, K3: wgc.cu

// Of a 4-D tensor, in elements.
struct Strides {
  int64_t n, c, h, w;
};

// The operands of both convolutions, all of one dtype. Sums are float32 or better, in an order that
// depends on the problem and the device only.
struct ConvCall {
  ConvProblem problem;
  DType dtype;
  const void* grad_output;  // [n][k][p][q]
  Strides grad_output_strides;
  const uint32_t* nonzeros;  // of grad_output, as PruneCall has it; read by the sparse kernels only
  const void* operand;  // AGB: weight [k][c / groups][r][s]; WGC: input [n][c][h][w]
  Strides operand_strides;
  void* result;  // AGB: grad_input, as the input; WGC: grad_weight, as the weight
  Strides result_strides;
  void* workspace;
};

// Null if the sparse kernel runs this problem on channels-last activations, else the reason why it
// does not, as a sentence without a full stop.
const char* agb_refusal(const ConvProblem& problem, DType dtype);
const char* wgc_refusal(const ConvProblem& problem, DType dtype);

// The sparse kernel if `nonzeros` is given and the call suits it (agb_suits, wgc_suits), else the plain one (plain.cu),
// which takes any problem and any strides.
size_t agb_workspace(const ConvCall& call, const Device& device);
cudaError_t agb(const ConvCall& call, const Device& device, cudaStream_t stream);
size_t wgc_workspace(const ConvCall& call, const Device& device);
cudaError_t wgc(const ConvCall& call, const Device& device, cudaStream_t stream);

// Whether the tensor [n][c][h][w] is dense in the memory order n, h, w, c. Strides of dimensions of
// size 1 do not matter.
static inline bool is_channels_last(const Strides& strides, int64_t n, int64_t c, int64_t h,
                                    int64_t w) {
  return (c == 1 || strides.c == 1) && (w == 1 || strides.w == c) &&
         (h == 1 || strides.h == w * c) && (n == 1 || strides.n == h * w * c);
}

// Whether the sparse kernel can run on these operands: the problem is not refused, grad_output and the
// input, or its gradient, are channels-last, and what WGC reads by vectors is aligned to 16 bytes.
static inline bool agb_suits(const ConvCall& call) {
  const ConvProblem& p = call.problem;
  return agb_refusal(p, call.dtype) == nullptr &&
         is_channels_last(call.grad_output_strides, p.n, p.k, p.p(), p.q()) &&
         is_channels_last(call.result_strides, p.n, p.c, p.h, p.w);
}
static inline bool wgc_suits(const ConvCall& call) {
  const ConvProblem& p = call.problem;
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return p.n > 0 && wgc_refusal(p, call.dtype) == nullptr && aligned(call.grad_output) &&
         aligned(call.operand) &&
         is_channels_last(call.grad_output_strides, p.n, p.k, p.p(), p.q()) &&
         is_channels_last(call.operand_strides, p.n, p.c, p.h, p.w);
}

}  // namespace sparsebwd::cuda
