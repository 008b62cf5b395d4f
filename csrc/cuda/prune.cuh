// SPDX-License-Identifier: Apache-2.0
// What the pruning kernel (prune.cu) is made of: how packs of elements lie in memory, where they
// are in the tensor, and what pruning makes of one.
#pragma once

#include <float.h>

#include <type_traits>

#include "element.cuh"
#include "sparsebwd/prune.h"

namespace sparsebwd::cuda {

// ---- positions

// What is added to a position to get to the next row of a warp, or to the one before. `delta`: the
// digits of that distance, as move() wants them; `packs`: the distance.
struct Step {
  int32_t delta[4];
  int64_t packs;
};

// Four nested loops over the quads of a tensor, innermost first: pack of channels, w, h, n
// (channels-last) or w, h, quad of channels, n (contiguous). All sizes are below 2^31.
struct Geometry {
  uint32_t radix[3];  // iterations of the three inner loops
  uint32_t outer;     // and of the outermost
  Step forward, backward;
  int64_t stride[4];  // in elements, of a step of each loop
  int64_t plane;      // h w
  uint32_t channels, width;
  // Channels-last:
  uint32_t packs;  // of a pixel; radix[0] may be more, so that no pixels share a word of nonzeros
  bool dense;  // it is not, and packs follow each other in memory
  uint32_t log2_packs_of_word;  // of nonzeros
  uint32_t shares_word[3];  // whether lanes 1, 2, 4 apart have parts of one word, as a mask
};

struct Position {
  uint32_t digit[4];
  int64_t pack;  // its number
};

// Adds digit by digit. A digit of `delta` is that of the step, less the radix, plus a carry. So the
// sum is negative unless there is a carry, and its sign, as a mask, takes back what was too much.
__device__ __forceinline__ void move(Position& position, const Step& step,
                                     const Geometry& geometry) {
  int32_t no_carry = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int32_t digit = static_cast<int32_t>(position.digit[i]) + step.delta[i] + no_carry;
    no_carry = digit >> 31;
    const auto radix = static_cast<int32_t>(geometry.radix[i]);
    position.digit[i] = static_cast<uint32_t>(digit - no_carry * radix);
  }
  position.digit[3] += static_cast<uint32_t>(step.delta[3] + no_carry);
  position.pack += step.packs;
}

// Divides by a divisor below 2^31; returns the remainder. 64-bit divisions take several times as
// long as others, so they are for those that need them.
__device__ __forceinline__ uint32_t divide(int64_t& dividend, uint32_t divisor) {
  const auto value = static_cast<uint64_t>(dividend);
  if (value >> 32) {
    dividend = static_cast<int64_t>(value / divisor);
    return static_cast<uint32_t>(value % divisor);
  }
  const auto low = static_cast<uint32_t>(value);
  dividend = low / divisor;
  return low % divisor;
}

// `step`: what a pack counts in the innermost loop.
__device__ __forceinline__ Position position_of(int64_t pack, int step, const Geometry& geometry) {
  Position position;
  position.pack = pack;
  int64_t index = pack * step;
#pragma unroll
  for (int i = 0; i < 3; ++i) position.digit[i] = divide(index, geometry.radix[i]);
  position.digit[3] = static_cast<uint32_t>(index);
  return position;
}

__device__ __forceinline__ int64_t offset_of(const Position& position, const Geometry& geometry) {
  int64_t offset = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    offset += static_cast<int64_t>(position.digit[i]) * geometry.stride[i];
  return offset;
}

// ---- packs

template <int Count>
struct alignas(Count % 4 ? 4 * Count : 16) Words {
  uint32_t word[Count];
};

// Part number `index` of a pack that is made of vectors, from memory.
template <class Vector, int Count>
__device__ __forceinline__ void load_part(Words<Count>& pack, int index, const void* memory) {
  const Vector vector = *static_cast<const Vector*>(memory);
  memcpy(pack.word + index * (sizeof(Vector) / 4), &vector, sizeof(Vector));
}

// And to memory. What is streamed leaves the L2 cache before all else.
template <class Vector, int Count>
__device__ __forceinline__ void store_part(void* memory, const Words<Count>& pack, int index,
                                           bool streams) {
  Vector vector;
  memcpy(&vector, pack.word + index * (sizeof(Vector) / 4), sizeof(Vector));
  if (streams) {
    __stcs(static_cast<Vector*>(memory), vector);
  } else {
    *static_cast<Vector*>(memory) = vector;
  }
}

// How many elements a word has.
template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// What the two layouts below have in common. Each says where packs are and moves them between
// memory and registers. Elements that are not there, beyond the last channel or the end of the
// tensor, are zeros, and not written.
template <class T, int Quads>
struct PackOf {
  using Element = T;
  using Storage = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;  // bits of an element
  static constexpr int kQuads = Quads;
  static constexpr int kElements = 4 * Quads;
  using Pack = Words<kElements / kPerWord<T>>;  // elements in the order of memory
  using Random = uint32_t[kElements];  // a word for each of them

  __device__ static __forceinline__ void put(Pack& pack, int element, Storage bits) {
    const int shift = 16 * (element % kPerWord<T>);
    pack.word[element / kPerWord<T>] |= static_cast<uint32_t>(bits) << shift;
  }
  __device__ static __forceinline__ Storage get(const Pack& pack, int element) {
    const int shift = 16 * (element % kPerWord<T>);
    return static_cast<Storage>(pack.word[element / kPerWord<T>] >> shift);
  }
};

// Memory order n, h, w, c: a pack is 16 bytes of channels of a pixel, or up to one quad where those
// do not fill vectors.
template <class T, bool Vectors>
struct ChannelsLast : PackOf<T, Vectors ? kPerWord<T> : 1> {
  using Base = PackOf<T, Vectors ? kPerWord<T> : 1>;
  using Base::kElements;
  using Base::kQuads;
  using typename Base::Pack;
  using typename Base::Random;
  using typename Base::Storage;
  static constexpr int kStep = 1;  // what a pack counts in its first digit
  static constexpr bool kHasBits = true;

  // Of the pack's first element.
  __device__ static __forceinline__ int64_t offset(const Position& position,
                                                   const Geometry& geometry) {
    return geometry.dense ? position.pack * kElements : offset_of(position, geometry);
  }

  // How many of the pack's elements there are.
  __device__ static __forceinline__ int present(const Position& position,
                                                const Geometry& geometry) {
    const uint32_t pack = position.digit[0];
    if (pack >= geometry.packs || position.digit[3] >= geometry.outer) return 0;
    if (Vectors) return kElements;
    const uint32_t left = geometry.channels - 4 * pack;
    return left < 4 ? static_cast<int>(left) : 4;
  }

  __device__ static __forceinline__ Pack load(const Storage* g, int present, const Geometry&) {
    Pack pack = {};
    if constexpr (Vectors) {
      if (present) load_part<uint4>(pack, 0, g);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < present) Base::put(pack, j, g[j]);
    }
    return pack;
  }

  __device__ static __forceinline__ void store(Storage* out, int present, const Pack& pack,
                                               bool streams, const Geometry&) {
    if constexpr (Vectors) {
      if (present) store_part<uint4>(out, pack, 0, streams);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < present) out[j] = Base::get(pack, j);
    }
  }

  __device__ static __forceinline__ void draw(const PruneSpec& spec, const Position& position,
                                              const Geometry&, Random& random) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const uint32_t c4 = position.digit[0] * kQuads + quad;
      const PhiloxCounter words =
          prune_words(spec, position.digit[3], c4, position.digit[2], position.digit[1]);
#pragma unroll
      for (int j = 0; j < 4; ++j) random[4 * quad + j] = words.word[j];
    }
  }

  // Neighbouring lanes have the parts of a word, and the first of them writes it. Words and packs
  // are numbered alike.
  __device__ static __forceinline__ void store_bits(uint32_t* nonzeros, const Position& position,
                                                    uint32_t lane, uint32_t bits,
                                                    const Geometry& geometry) {
    const uint32_t place = lane & ((1u << geometry.log2_packs_of_word) - 1);
    bits <<= place * kElements;
#pragma unroll
    for (int i = 0; kElements << i < 32; ++i)
      bits |= __shfl_xor_sync(~0u, bits, 1 << i) & geometry.shares_word[i];
    if (place == 0 && position.digit[3] < geometry.outer)
      nonzeros[position.pack >> geometry.log2_packs_of_word] = bits;
  }
};

// Memory order n, c, h, w: a pack is two adjacent pixels of four planes, or one where planes have
// an odd number of pixels.
template <class T, bool Vectors>
struct Contiguous : PackOf<T, Vectors ? 2 : 1> {
  using Base = PackOf<T, Vectors ? 2 : 1>;
  using Base::kQuads;
  using typename Base::Pack;
  using typename Base::Random;
  using typename Base::Storage;
  using Vector = std::conditional_t<sizeof(T) == 4, uint2, unsigned>;  // two pixels
  static constexpr int kStep = kQuads;
  static constexpr bool kHasBits = false;

  // Of the pack's first element.
  __device__ static __forceinline__ int64_t offset(const Position& position,
                                                   const Geometry& geometry) {
    return offset_of(position, geometry);
  }

  // How many of the pack's planes there are.
  __device__ static __forceinline__ int present(const Position& position,
                                                const Geometry& geometry) {
    if (position.digit[3] >= geometry.outer) return 0;
    const uint32_t left = geometry.channels - 4 * position.digit[2];
    return left < 4 ? static_cast<int>(left) : 4;
  }

  __device__ static __forceinline__ Pack load(const Storage* g, int present,
                                              const Geometry& geometry) {
    Pack pack = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < present) {
        if constexpr (Vectors) {
          load_part<Vector>(pack, j, g + j * geometry.plane);
        } else {
          Base::put(pack, j, g[j * geometry.plane]);
        }
      }
    }
    return pack;
  }

  __device__ static __forceinline__ void store(Storage* out, int present, const Pack& pack,
                                               bool streams, const Geometry& geometry) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < present) {
        if constexpr (Vectors) {
          store_part<Vector>(out + j * geometry.plane, pack, j, streams);
        } else {
          out[j * geometry.plane] = Base::get(pack, j);
        }
      }
    }
  }

  __device__ static __forceinline__ void draw(const PruneSpec& spec, const Position& position,
                                              const Geometry& geometry, Random& random) {
    uint32_t w = position.digit[0], h = position.digit[1];
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const PhiloxCounter words = prune_words(spec, position.digit[3], position.digit[2], h, w);
#pragma unroll
      for (int j = 0; j < 4; ++j) random[j * kQuads + quad] = words.word[j];
      if (++w == geometry.width) {
        w = 0;
        ++h;
      }
    }
  }
};

// ---- elements

// Element `part` of those in a word, as float32.
template <class T>
__device__ __forceinline__ float value_of(uint32_t word, int part) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(word);
  } else {
    return to_float(T{static_cast<uint16_t>(word >> 16 * part)});
  }
}

__device__ __forceinline__ uint32_t bits_of(float value) { return float_bits(value); }
__device__ __forceinline__ uint32_t bits_of(BFloat16 value) { return value.bits; }
__device__ __forceinline__ uint32_t bits_of(Float16 value) { return value.bits; }

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) <= FLT_MAX; }

template <class T, int Packs, int Count, class Body>
__device__ __forceinline__ void for_magnitudes(const Words<Count> (&packs)[Packs], Body body) {
#pragma unroll
  for (int pack = 0; pack < Packs; ++pack)
#pragma unroll
    for (int i = 0; i < Count; ++i)
#pragma unroll
      for (int part = 0; part < kPerWord<T>; ++part)
        body(fabsf(value_of<T>(packs[pack].word[i], part)));
}

// Up to 2^-44 of itself. `low` has what `high` loses (Knuth's sum of two), for want of units for float64.
template <class T, int Packs, int Count>
__device__ __forceinline__ double sum_of_magnitudes(const Words<Count> (&packs)[Packs]) {
  float high = 0.0f, low = 0.0f;
  for_magnitudes<T>(packs, [&](float magnitude) {
    const float sum = high + magnitude, added = sum - high;
    low += (high - (sum - added)) + (magnitude - added);
    high = sum;
  });
  double result = static_cast<double>(high) + static_cast<double>(low);
  if (!is_finite(high)) {  // too large for a float32, or something is not finite
    result = 0.0;
    for_magnitudes<T>(packs, [&](float magnitude) { result += static_cast<double>(magnitude); });
  }
  return result;
}

// On the bits of all elements in a word at once: float32 values rounded toward zero, all ones for
// elements with a sign and zeros for others, and the larger of magnitudes.
template <class T>
__device__ __forceinline__ uint32_t word_toward_zero(const float* values) {
  if constexpr (kPerWord<T> == 1) {
    return float_bits(values[0]);
  } else {
    return pair_toward_zero<T>(values[0], values[1]);
  }
}

template <class T>
__device__ __forceinline__ uint32_t sign_masks(uint32_t word) {
  return kPerWord<T> == 1 ? static_cast<uint32_t>(static_cast<int32_t>(word) >> 31)
                          : masks_of_halves(word);
}

template <class T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return kPerWord<T> > 1 ? __vmaxu2(a, b) : a > b ? a : b;
}

// prune_element (sparsebwd/prune.h) for all elements of a pack, with integer instructions, which
// take those of a word together: magnitudes are in the order of their bits, and NaN comes last.
// - An element remains if its magnitude is more than its bound, tau * r. The bound may be rounded
//   toward zero, since it is then still not less than the same magnitudes.
// - What remains is the larger of its magnitude and tau: itself if it is at least tau.
// A bound is less than tau. So elements from tau on remain without a test of their own.
template <class T>
class Pruner {
  static constexpr int kParts = kPerWord<T>;
  static constexpr uint32_t kOnes = kParts == 1 ? 1u : 0x10001u;  // 1 in each part of a word
  static constexpr uint32_t kSigns = kOnes << (32 / kParts - 1);

 public:
  __device__ explicit Pruner(T tau)
      : tau_(to_float(tau)),
        tau_bits_(bits_of(tau) * kOnes),
        keeps_(sign_masks<T>(kSigns - tau_bits_)) {}

  // Returns which elements are not zero then, one bit each.
  template <int Count>
  __device__ __forceinline__ uint32_t operator()(Words<Count>& pack,
                                                 const uint32_t (&random)[Count * kParts]) const {
    float bounds[Count * kParts];
    set_bounds(bounds, random);
    uint32_t zeros = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const uint32_t word = pack.word[i], magnitudes = word & ~kSigns;
      // The sign of a bound is set. It stays so unless more than the bound is subtracted.
      const uint32_t pruned = sign_masks<T>(word_toward_zero<T>(bounds + kParts * i) - magnitudes);
      const uint32_t remaining = larger<T>(magnitudes, tau_bits_) | (word & kSigns);
      pack.word[i] = remaining & (~pruned | keeps_);
      zeros |= pruned & (kParts == 1 ? 1u << i : 0x20001u << 2 * i);
    }
    if (kParts == 2) zeros |= zeros >> 16;
    return ~zeros & ((1u << Count * kParts) - 1);
  }

 private:
  // The bounds, with their signs set.
  template <int Elements>
  __device__ __forceinline__ void set_bounds(float (&bounds)[Elements],
                                             const uint32_t (&random)[Elements]) const {
    if (tau_ > 0.0f && tau_ < 0x1p-102f) {
      // The product may be subnormal, thus rounded by more, even up to tau.
      const float below_tau = float_of_bits(float_bits(tau_) - 1);
#pragma unroll
      for (int i = 0; i < Elements; ++i)
        bounds[i] = -fminf(tau_ * uniform_of_word(random[i]), below_tau);
    } else {
      // One multiplication for two: that of tau by a power of two is exact.
#pragma unroll
      for (int i = 0; i < Elements; ++i)
        bounds[i] = static_cast<float>(random[i] >> 8) * (tau_ * -0x1p-24f);
    }
  }

  float tau_;
  uint32_t tau_bits_;
  // All ones if tau is 0: then only zeros are not more than their bound, and -0 stays.
  uint32_t keeps_;
};

// ---- packs in shared memory: each thread has its own

template <class Pack, int Threads>
class Parking {
 public:
  __device__ explicit Parking(unsigned char* shared)
      : packs_(reinterpret_cast<Pack*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ void put(uint32_t slot, const Pack& pack) {
    packs_[slot * Threads] = pack;
  }
  __device__ __forceinline__ Pack get(uint32_t slot) const { return packs_[slot * Threads]; }

 private:
  Pack* packs_;
};

}  // namespace sparsebwd::cuda
