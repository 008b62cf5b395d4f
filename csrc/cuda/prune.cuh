// SPDX-License-Identifier: Apache-2.0
// What the pruning kernel (prune.cu) is made of: how packs of elements lie in memory, where they
// are in the tensor, and what pruning makes of one.
#pragma once

#include <float.h>

#include "element.cuh"
#include "sparsebwd/prune.h"

namespace sparsebwd::cuda {

// ---- positions

// Four nested loops over the quads of a tensor, innermost first: pack of channels, w, h, n
// (channels-last) or w, h, quad of channels, n (contiguous). All sizes are below 2^31.
struct Geometry {
  uint32_t radix[3];                // iterations of the three inner loops
  uint32_t outer;                   // and of the outermost
  uint32_t forward[4], backward[4];  // digits of a step of kWarps rows, and of its complement
  int64_t stride[4];                // in elements
  int64_t plane;                    // h w
  uint32_t channels, width;
  uint32_t packs;                   // of a pixel, channels-last; radix[0] may be more, for packs of a word
  uint32_t packs_of_word;           // of nonzeros; a power of two
};

struct Position {
  uint32_t digit[4];
};

// One place further by `step`, which may go beyond the end.
__device__ __forceinline__ void move(Position& position, const uint32_t (&step)[4], const Geometry& geometry) {
  uint32_t carry = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    uint32_t digit = position.digit[i] + step[i] + carry;
    carry = digit >= geometry.radix[i];
    position.digit[i] = carry ? digit - geometry.radix[i] : digit;
  }
  position.digit[3] += step[3] + carry;
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

__device__ __forceinline__ Position position_of(int64_t index, const Geometry& geometry) {
  Position position;
#pragma unroll
  for (int i = 0; i < 3; ++i) position.digit[i] = divide(index, geometry.radix[i]);
  position.digit[3] = static_cast<uint32_t>(index);
  return position;
}

__device__ __forceinline__ int64_t offset_of(const Position& position, const Geometry& geometry) {
  int64_t offset = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) offset += static_cast<int64_t>(position.digit[i]) * geometry.stride[i];
  return offset;
}

// ---- packs

template <int Count>
struct alignas(Count % 4 ? 4 * Count : 16) Words {
  uint32_t word[Count];
};

// Part number `index` of a pack seen as equal parts.
template <int Count, int PartCount>
__device__ __forceinline__ void set_part(Words<Count>& pack, int index, const Words<PartCount>& part) {
#pragma unroll
  for (int i = 0; i < PartCount; ++i) pack.word[index * PartCount + i] = part.word[i];
}

template <class Part, int Count>
__device__ __forceinline__ Part get_part(const Words<Count>& pack, int index) {
  Part part;
  constexpr int kPartCount = sizeof(Part) / 4;
#pragma unroll
  for (int i = 0; i < kPartCount; ++i) part.word[i] = pack.word[index * kPartCount + i];
  return part;
}

template <int Bytes>
struct UnsignedOf;
template <>
struct UnsignedOf<2> {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};

// Types of a layout whose packs have `Quads` quads of type T.
template <class T, int Quads>
struct PackOf {
  using Element = T;
  using Storage = typename UnsignedOf<sizeof(T)>::type;  // bits of an element
  static constexpr int kQuads = Quads;
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  using Pack = Words<4 * Quads / kPerWord>;  // elements in the order of memory
  using Random = uint32_t[4 * Quads];        // for each of them

  __device__ static __forceinline__ void put(Pack& pack, int element, Storage bits) {
    const int shift = 16 * (element % kPerWord);
    pack.word[element / kPerWord] |= static_cast<uint32_t>(bits) << shift;
  }
  __device__ static __forceinline__ Storage get(const Pack& pack, int element) {
    return static_cast<Storage>(pack.word[element / kPerWord] >> 16 * (element % kPerWord));
  }
};

// Memory order n, h, w, c: a pack is 16 bytes of channels of a pixel, or up to one quad where those
// do not fill vectors.
template <class T, bool Vectors>
struct ChannelsLast : PackOf<T, Vectors ? 4 / static_cast<int>(sizeof(T)) : 1> {
  using Base = PackOf<T, Vectors ? 4 / static_cast<int>(sizeof(T)) : 1>;
  using typename Base::Pack;
  using typename Base::Random;
  using typename Base::Storage;
  using Base::kQuads;
  static constexpr int kElements = 4 * kQuads;
  static constexpr int kStep = 1;  // what a pack counts in its first digit
  static constexpr bool kHasBits = true;

  // How many of the pack's elements there are.
  __device__ static __forceinline__ int present(const Position& position, const Geometry& geometry) {
    const uint32_t pack = position.digit[0];
    if (pack >= geometry.packs || position.digit[3] >= geometry.outer) return 0;
    if (Vectors) return kElements;
    const uint32_t left = geometry.channels - 4 * pack;
    return left < 4 ? static_cast<int>(left) : 4;
  }

  __device__ static __forceinline__ Pack load(const Storage* g, const Position& position,
                                              const Geometry& geometry) {
    Pack pack = {};
    const int elements = present(position, geometry);
    g += offset_of(position, geometry);
    if constexpr (Vectors) {
      if (elements) pack = *reinterpret_cast<const Pack*>(g);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < elements) Base::put(pack, j, g[j]);
    }
    return pack;
  }

  __device__ static __forceinline__ void store(Storage* out, const Position& position, const Pack& pack,
                                               const Geometry& geometry) {
    const int elements = present(position, geometry);
    out += offset_of(position, geometry);
    if constexpr (Vectors) {
      if (elements) *reinterpret_cast<Pack*>(out) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < elements) out[j] = Base::get(pack, j);
    }
  }

  __device__ static __forceinline__ void draw(const PruneSpec& spec, const Position& position,
                                              const Geometry&, Random& random) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const PhiloxCounter words = prune_words(spec, position.digit[3], position.digit[0] * kQuads + quad,
                                              position.digit[2], position.digit[1]);
#pragma unroll
      for (int j = 0; j < 4; ++j) random[4 * quad + j] = words.word[j];
    }
  }

  // Adjacent lanes hold the packs of a word, whose number follows from that of the pack.
  __device__ static __forceinline__ void store_bits(uint32_t* nonzeros, int64_t pack, const Position& position,
                                                    uint32_t bits, const Geometry& geometry) {
    const uint32_t packs = geometry.packs_of_word, place = static_cast<uint32_t>(pack) & (packs - 1);
    bits <<= place * kElements;
#pragma unroll
    for (uint32_t distance = 1; distance < 32 / kElements; distance *= 2)
      if (distance < packs) bits |= __shfl_xor_sync(~0u, bits, distance);
    if (place == 0 && position.digit[3] < geometry.outer) nonzeros[pack / packs] = bits;
  }
};

// Memory order n, c, h, w: a pack is two adjacent pixels of four planes, or one where a plane has an
// odd number of them.
template <class T, bool Vectors>
struct Contiguous : PackOf<T, Vectors ? 2 : 1> {
  using Base = PackOf<T, Vectors ? 2 : 1>;
  using typename Base::Pack;
  using typename Base::Random;
  using typename Base::Storage;
  using Base::kQuads;
  using Vector = Words<2 / Base::kPerWord>;
  static constexpr int kStep = kQuads;
  static constexpr bool kHasBits = false;

  // How many of the pack's planes there are.
  __device__ static __forceinline__ int present(const Position& position, const Geometry& geometry) {
    if (position.digit[3] >= geometry.outer) return 0;
    const uint32_t left = geometry.channels - 4 * position.digit[2];
    return left < 4 ? static_cast<int>(left) : 4;
  }

  __device__ static __forceinline__ Pack load(const Storage* g, const Position& position,
                                              const Geometry& geometry) {
    Pack pack = {};
    const int planes = present(position, geometry);
    g += offset_of(position, geometry);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < planes) {
        if constexpr (Vectors) {
          set_part(pack, j, *reinterpret_cast<const Vector*>(g + j * geometry.plane));
        } else {
          Base::put(pack, j, g[j * geometry.plane]);
        }
      }
    }
    return pack;
  }

  __device__ static __forceinline__ void store(Storage* out, const Position& position, const Pack& pack,
                                               const Geometry& geometry) {
    const int planes = present(position, geometry);
    out += offset_of(position, geometry);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < planes) {
        if constexpr (Vectors) {
          *reinterpret_cast<Vector*>(out + j * geometry.plane) = get_part<Vector>(pack, j);
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
  if constexpr (sizeof(T) == 4) return float_of_bits(word);
  else return to_float(T{static_cast<uint16_t>(word >> 16 * part)});
}

template <class T, int Count>
__device__ __forceinline__ void add_magnitudes(double& sum, const Words<Count>& pack) {
#pragma unroll
  for (int i = 0; i < Count; ++i)
#pragma unroll
    for (int part = 0; part < 4 / static_cast<int>(sizeof(T)); ++part)
      sum += static_cast<double>(fabsf(value_of<T>(pack.word[i], part)));
}

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) <= FLT_MAX; }

// prune_element (sparsebwd/prune.h) for all elements of a pack, on their bits: those that stay as
// they are keep them, NaN included.
template <class T>
class Pruner {
 public:
  __device__ explicit Pruner(float tau)
      : tau_(tau),
        // Where nothing is pruned, what is below the limit is 0; it passes as well.
        limit_(tau > 0.0f ? tau : float_of_bits(1)),
        passing_(tau > 0.0f ? 0u : ~0u) {
    if constexpr (sizeof(T) == 4) tau_bits_ = float_bits(tau);
    else tau_bits_ = from_float<T>(tau).bits * 0x10001u;
  }

  // Returns which elements are not zero then, one bit each.
  template <int Count>
  __device__ __forceinline__ uint32_t operator()(Words<Count>& pack,
                                                 const uint32_t (&random)[Count * 4 / sizeof(T)]) const {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    constexpr uint32_t kSigns = kPerWord == 1 ? 0x80000000u : 0x80008000u;
    uint32_t nonzeros = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      const uint32_t word = pack.word[i];
      const uint32_t survivor = (word & kSigns) | tau_bits_, dropped = word & passing_;
      uint32_t parts[kPerWord];  // each right in its own bits
#pragma unroll
      for (int part = 0; part < kPerWord; ++part) {
        const int element = i * kPerWord + part;
        const float magnitude = fabsf(value_of<T>(word, part));
        const bool below = magnitude < limit_;
        const bool survives = magnitude > tau_ * uniform_of_word(random[element]);
        parts[part] = !below ? word : survives ? survivor : dropped;
        if (!below || survives) nonzeros |= 1u << element;
      }
      if constexpr (kPerWord == 1) pack.word[i] = parts[0];
      else pack.word[i] = (parts[0] & 0xFFFFu) | (parts[1] & 0xFFFF0000u);
    }
    return nonzeros;
  }

 private:
  float tau_, limit_;
  uint32_t passing_, tau_bits_;
};

// ---- packs in shared memory: each thread has its own

template <class Pack, int Threads>
class Parking {
 public:
  __device__ explicit Parking(unsigned char* shared)
      : packs_(reinterpret_cast<Pack*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ void put(uint32_t slot, const Pack& pack) { packs_[slot * Threads] = pack; }
  __device__ __forceinline__ Pack get(uint32_t slot) const { return packs_[slot * Threads]; }

 private:
  Pack* packs_;
};

}  // namespace sparsebwd::cuda
