// SPDX-License-Identifier: Apache-2.0
// Tensors between fences, random numbers, and the definitions in float64 of what the kernels compute.
#pragma once

#include <stdint.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "sparsebwd/conv_problem.h"
#include "sparsebwd/dtype.h"

namespace parity {

using sparsebwd::ConvProblem;
using sparsebwd::DType;

class Random {
 public:
  Random(uint64_t seed, uint64_t number) {
    std::seed_seq words{seed, seed >> 32, number, number >> 32};
    engine_.seed(words);
  }
  // From `least` to `most`.
  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(engine_() % static_cast<uint64_t>(most - least + 1));
  }
  // From 1 to `most`, small ones more often.
  int64_t size(int64_t most) {
    const int64_t limits[] = {2, 8, most};
    return between(1, std::min(most, limits[between(0, 2)]));
  }
  template <class T>
  T pick(std::initializer_list<T> from) {
    return from.begin()[between(0, static_cast<int64_t>(from.size()) - 1)];
  }
  bool chance(double probability) {
    return static_cast<double>(engine_() >> 11) * 0x1p-53 < probability;
  }
  float normal() { return std::normal_distribution<float>()(engine_); }
  int64_t word() { return static_cast<int64_t>(engine_()); }

 private:
  std::mt19937_64 engine_;
};

// A 4-D tensor with its values in the order of its logical indices. Before, between and behind its elements,
// and where nothing was written, all bits are set: that is a NaN.
class Tensor {
 public:
  // order: the dimensions from the one with the largest stride to that with stride 1.
  Tensor(DType dtype, const int64_t (&size)[4], const int (&order)[4], Random& random)
      : dtype_(dtype), fence_(64 + random.between(0, 15)) {
    memcpy(size_, size, sizeof(size_));
    int64_t count = 1;
    for (int i = 3; i >= 0; --i) {
      stride_[order[i]] = count;
      count *= size[order[i]];
    }
    count_ = count;
    bytes_.assign(static_cast<size_t>((count + 2 * fence_) * dtype_size(dtype)), '\xff');
  }
  Tensor(const Tensor&) = default;

  void* data() { return bytes_.data() + fence_ * dtype_size(dtype_); }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  int64_t size(int i) const { return size_[i]; }
  int64_t stride(int i) const { return stride_[i]; }

  uint32_t bits(int64_t logical) const {
    uint32_t result = 0;
    memcpy(&result, bytes_.data() + at(logical), static_cast<size_t>(dtype_size(dtype_)));
    return result;
  }
  float get(int64_t logical) const {
    const uint32_t found = bits(logical);
    return dtype_ == DType::kFloat32 ? sparsebwd::float_of_bits(found)
                                     : sparsebwd::float_of_bfloat16(static_cast<uint16_t>(found));
  }
  void set(int64_t logical, float value) {
    if (dtype_ == DType::kFloat32) return (void)memcpy(&bytes_[at(logical)], &value, 4);
    const uint16_t rounded = sparsebwd::bfloat16_of_float(value);
    memcpy(&bytes_[at(logical)], &rounded, 2);
  }
  // Whether nothing beside the elements was written.
  bool fences_kept() const {
    const auto fence = static_cast<size_t>(fence_ * dtype_size(dtype_));
    for (size_t i = 0; i < fence; ++i)
      if (bytes_[i] != '\xff' || bytes_[bytes_.size() - 1 - i] != '\xff') return false;
    return true;
  }

 private:
  size_t at(int64_t logical) const {
    int64_t offset = fence_;
    for (int i = 3; i >= 0; --i) {
      offset += logical % size_[i] * stride_[i];
      logical /= size_[i];
    }
    return static_cast<size_t>(offset * dtype_size(dtype_));
  }

  DType dtype_;
  int64_t fence_, count_, size_[4], stride_[4];
  std::vector<char> bytes_;
};

constexpr int kPlanes[4] = {0, 1, 2, 3}, kChannelsLast[4] = {0, 2, 3, 1};

// Sums of products in float64, with what bounds the error of such a sum in float32, in whatever order.
struct Sums {
  explicit Sums(int64_t count) : sum(count), magnitude(count), products(count) {}

  void add(int64_t i, double product) {
    sum[i] += product;
    magnitude[i] += product < 0 ? -product : product;
    ++products[i];
  }
  double bound(int64_t i) const { return (products[i] + 1) * 0x1p-24 * magnitude[i]; }

  std::vector<double> sum, magnitude;
  std::vector<int64_t> products;
};

// AGB and WGC as the derivatives of the convolution's definition.
inline void convolve_backward(const ConvProblem& problem, const Tensor& x, const Tensor& w,
                              const Tensor& g, Sums& dx, Sums& dw) {
  const int64_t p_end = problem.p(), q_end = problem.q();
  const int64_t channels = problem.c / problem.groups, outputs = problem.k / problem.groups;
  for (int64_t i = 0; i < g.count(); ++i) {
    const double gradient = g.get(i);
    if (gradient == 0) continue;
    const int64_t q = i % q_end, p = i / q_end % p_end, k = i / q_end / p_end % problem.k;
    const int64_t n = i / q_end / p_end / problem.k, first = k / outputs * channels;
    for (int64_t r = 0; r < problem.r; ++r) {
      const int64_t row = p * problem.stride_h - problem.pad_h + r * problem.dil_h;
      if (row < 0 || row >= problem.h) continue;
      for (int64_t s = 0; s < problem.s; ++s) {
        const int64_t column = q * problem.stride_w - problem.pad_w + s * problem.dil_w;
        if (column < 0 || column >= problem.w) continue;
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at_x = ((n * problem.c + first + c) * problem.h + row) * problem.w + column;
          const int64_t at_w = ((k * channels + c) * problem.r + r) * problem.s + s;
          dx.add(at_x, gradient * w.get(at_w));
          dw.add(at_w, gradient * x.get(at_x));
        }
      }
    }
  }
}

}  // namespace parity
