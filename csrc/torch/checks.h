// SPDX-License-Identifier: Apache-2.0
// Checks of arguments that the raw operators of the CPU and of CUDA share. What is refused throws
// std::invalid_argument, a ValueError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparsebwd/conv_problem.h"
#include "sparsebwd/prune.h"

namespace sparsebwd::checks {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class Values>
std::string text(const Values& values) {
  std::string result = "[";
  for (size_t i = 0; i < values.size(); ++i) result += (i ? ", " : "") + std::to_string(values[i]);
  return result + "]";
}

inline bool has_sizes(const Tensor& tensor, const Sizes& sizes) {
  return std::equal(tensor.sizes().begin(), tensor.sizes().end(), sizes.begin(), sizes.end());
}

// Whether the tensor is dense with its dimensions in this memory order, outermost first. The
// stride of a dimension of size 1 does not matter, and no stride of an empty tensor does.
inline bool is_dense(const Tensor& tensor, const Sizes& order) {
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t size = tensor.size(order[i]);
    if (size != 1 && tensor.stride(order[i]) != expected) return false;
    expected *= size;
  }
  return true;
}

inline const Sizes kContiguous = {0, 1, 2, 3};
inline const Sizes kChannelsLast = {0, 2, 3, 1};

// A gradient that can be pruned, of sizes up to `most`: positions are counted in 32 bits.
inline PruneShape checked_prune_shape(const Tensor& tensor, const char* name,
                                      int64_t most = std::numeric_limits<uint32_t>::max()) {
  check(tensor.dim() == 4, name, ": got ", tensor.dim(),
        " dimensions, accepted are 4 (n, c, h, w)");
  const bool channels_last = is_dense(tensor, kChannelsLast);
  check(channels_last || is_dense(tensor, kContiguous), name, ": got strides ",
        text(tensor.strides()), " for shape ", text(tensor.sizes()),
        ", accepted are contiguous and channels_last tensors");
  for (int64_t dim = 0; dim < 4; ++dim)
    check(tensor.size(dim) <= most, name, ": got shape ", text(tensor.sizes()),
          ", accepted are sizes up to ", most);
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3), channels_last};
}

// The memory of `out` is to be as that of `g`, which checked_prune_shape accepted.
inline void check_alike(const Tensor& out, const char* name, const Tensor& g, const char* g_name) {
  check(out.scalar_type() == g.scalar_type() && out.dim() == 4 &&
            std::equal(out.sizes().begin(), out.sizes().end(), g.sizes().begin()) &&
            is_dense(out, is_dense(g, kChannelsLast) ? kChannelsLast : kContiguous),
        name, ": got ", toString(out.scalar_type()), " of shape ", text(out.sizes()),
        " and strides ", text(out.strides()), ", accepted are those of ", g_name, ": ",
        toString(g.scalar_type()), ", ", text(g.sizes()), " and ", text(g.strides()));
}

inline void check_key(const Tensor& key) {
  check(key.scalar_type() == ScalarType::Long && key.dim() == 1 && key.size(0) == 2 &&
            key.stride(0) == 1,
        "key: got ", toString(key.scalar_type()), " of shape ", text(key.sizes()),
        ", accepted is Long (int64) of shape [2]");
}

struct CheckedProblem {
  ConvProblem problem;
  const char* refusal;  // why kernels do not take it, null if they do
};

// Checks the numbers and that they fit together. `refusal(problem)`: why kernels do not take it, or null.
template <class Refusal>
CheckedProblem checked_numbers(const Sizes& input_size, const Sizes& weight_size,
                               const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                               int64_t groups, Refusal refusal) {
  check(input_size.size() == 4, "input_size: got ", text(input_size), ", accepted are 4 sizes");
  check(weight_size.size() == 4, "weight_size: got ", text(weight_size), ", accepted are 4 sizes");
  for (const auto* pair : {&stride, &padding, &dilation})
    check(pair->size() == 2, "stride, padding, dilation: got ", text(*pair),
          ", accepted are 2 numbers each");
  const ConvProblem problem = {input_size[0],  input_size[1],  input_size[2],  input_size[3],
                               weight_size[0], weight_size[2], weight_size[3], stride[0],
                               stride[1],      padding[0],     padding[1],     dilation[0],
                               dilation[1],    groups};
  check(groups >= 1 && problem.c >= 1 && problem.k >= 1 && problem.c % groups == 0 &&
            problem.k % groups == 0 && weight_size[1] == problem.c / groups,
        "groups: got ", groups, " for ", problem.c, " input channels and weight ",
        text(weight_size), ", accepted is a divisor of both numbers of channels");
  for (const int64_t size : {problem.h, problem.w, problem.r, problem.s, problem.stride_h,
                             problem.stride_w, problem.dil_h, problem.dil_w})
    check(size >= 1, "input_size, weight_size, stride, dilation: got ", text(input_size), ", ",
          text(weight_size), ", ", text(stride), " and ", text(dilation),
          ", accepted are numbers above 0");
  check(problem.n >= 0 && problem.pad_h >= 0 && problem.pad_w >= 0, "input_size and padding: got ",
        text(input_size), " and ", text(padding), ", accepted are numbers from 0 on");
  // Before anything is computed from the numbers.
  if (const char* reason = problem_refusal(problem)) return {problem, reason};
  check(problem.h + 2 * problem.pad_h > problem.dil_h * (problem.r - 1) &&
            problem.w + 2 * problem.pad_w > problem.dil_w * (problem.s - 1),
        "weight_size: got ", text(weight_size), ", accepted is a kernel not larger than the input ",
        text(input_size), " with padding ", text(padding));
  return {problem, refusal(problem)};
}

// The same for a problem that is to be computed.
template <class Refusal>
ConvProblem checked_problem(const Sizes& input_size, const Sizes& weight_size, const Sizes& stride,
                            const Sizes& padding, const Sizes& dilation, int64_t groups,
                            Refusal refusal) {
  const CheckedProblem checked =
      checked_numbers(input_size, weight_size, stride, padding, dilation, groups, refusal);
  check(!checked.refusal, "input_size, weight_size, stride, padding, dilation: got ",
        text(input_size), ", ", text(weight_size), ", ", text(stride), ", ", text(padding), " and ",
        text(dilation), ", which no kernel takes: ", checked.refusal ? checked.refusal : "");
  return checked.problem;
}

}  // namespace sparsebwd::checks
