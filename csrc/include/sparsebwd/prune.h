// SPDX-License-Identifier: Apache-2.0
// Stochastic pruning of one element (Algorithm 1 of Ye et al. (2019)): the definition that every
// kernel agrees with bit for bit. Scalar, for host and device.
#pragma once

#include <stdint.h>

#include "sparsebwd/philox.h"

namespace sparsebwd {

// A dense 4-D tensor.
struct PruneShape {
  int64_t n, c, h, w;
  bool channels_last;  // memory order n, h, w, c; else n, c, h, w
};

// How many recent values of sigma the predicted threshold is the mean of.
constexpr int kSigmaHistory = 4;

// What pruning needs beside the gradient.
struct PruneSpec {
  float tau;            // threshold, already rounded to the gradient's dtype; 0 prunes nothing
  PhiloxKey key;        // first word of the key tensor
  uint32_t w_xor;       // low half of the second word, mixed into the column
  uint32_t h_xor;       // high half of the second word, mixed into the row
};

SPARSEBWD_HOST_DEVICE static inline PruneSpec make_prune_spec(float tau, int64_t key0,
                                                              int64_t key1) {
  const uint64_t a = static_cast<uint64_t>(key0), b = static_cast<uint64_t>(key1);
  return {tau,
          {{static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32)}},
          static_cast<uint32_t>(b),
          static_cast<uint32_t>(b >> 32)};
}

// Random words of channels 4 * c4 .. 4 * c4 + 3 at (n, h, w): channel c uses word c % 4.
SPARSEBWD_HOST_DEVICE static inline PhiloxCounter prune_words(const PruneSpec& spec, uint32_t n,
                                                              uint32_t c4, uint32_t h, uint32_t w) {
  return philox4x32<>({{w ^ spec.w_xor, h ^ spec.h_xor, n, c4}}, spec.key);
}

// The pruned value of `g`: below tau it becomes copysign(tau, g) with probability |g| / tau, else
// +0; anything else, NaN included, stays as it is.
SPARSEBWD_HOST_DEVICE static inline float prune_element(float g, float tau, uint32_t word) {
  const float magnitude = g < 0.0f ? -g : g;
  if (!(magnitude < tau)) return g;
  if (!(magnitude > tau * uniform_of_word(word))) return 0.0f;
  return g < 0.0f ? -tau : tau;
}

}  // namespace sparsebwd
