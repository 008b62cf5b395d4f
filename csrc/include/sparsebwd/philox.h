// SPDX-License-Identifier: Apache-2.0
// The one definition of the random numbers that pruning uses: Philox4x32 (Salmon et al., "Parallel
// Random Numbers: As Easy as 1, 2, 3", SC 2011). A number is a function of the key and of the
// logical position (n, c, h, w) only: layout, launch shape, threads and instruction set do not
// enter. Scalar, for host and device; the vectorised kernels are tested against it.
#pragma once

#include <stdint.h>

#include "sparsebwd/host_device.h"

namespace sparsebwd {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
// The fewest rounds that pass BigCrush; 10 is the generator's textbook default.
constexpr int kPhiloxRounds = 7;

struct PhiloxKey {
  uint32_t word[2];
};

struct PhiloxCounter {
  uint32_t word[4];
};

// Four random words for a counter.
template <int Rounds = kPhiloxRounds>
SPARSEBWD_HOST_DEVICE static inline PhiloxCounter philox4x32(PhiloxCounter counter, PhiloxKey key) {
  uint32_t x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
  uint32_t k0 = key.word[0], k1 = key.word[1];
  for (int round = 0; round < Rounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * x0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{x0, x1, x2, x3}};
}

// Uniform on [0, 1): the 24 high bits of a word, exact in float32.
SPARSEBWD_HOST_DEVICE static inline float uniform_of_word(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

}  // namespace sparsebwd
