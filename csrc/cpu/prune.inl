// SPDX-License-Identifier: Apache-2.0
// Pruning kernels on vectors. Included once by an ISA file, inside an anonymous namespace, after
// that file has defined
//   Floats    kLanes float32 lanes           Words     the same lanes as uint32
//   Doubles   kLanes / 2 float64 lanes       Counters  kLanes / 2 uint64 lanes
// and the functions on them that are used here.
//
// Random numbers: a Counters vector holds one 32-bit word of kLanes / 2 Philox counters, each in
// the low half of a 64-bit lane. A widening multiplication reads only that half and leaves the low
// word of its product there, so that no round has anything to repack. High halves hold garbage.
// Two Counters become two Words by interleaving, once, after the last round.

constexpr int kCounters = kLanes / 2;
constexpr int kBlock = 4 * kCounters;  // channels that a Counters vector serves: two vectors
constexpr int kGroup = 4;              // blocks computed together, to hide latency
constexpr int kPartialSums = 32;       // of the definition of abs_sum

// ---- elements

struct Pair {
  Floats a, b;
};

// Two vectors of elements at a time: `a` holds the first kLanes, `b` the others.
struct Float32 {
  using Storage = float;
  static inline Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
  static inline void store_pair(float* p, Pair v) {
    store(p, v.a);
    store(p + kLanes, v.b);
  }
  static inline void store_pair_f32(float* p, Pair v) { store_pair(p, v); }
  // The index of the element in lane `lane` of vector `part` of a pair.
  static inline int index(int part, int lane) { return part * kLanes + lane; }
};

// `a` holds the elements of even index, `b` those of odd index. Storing truncates, which is exact:
// every value came from a bfloat16 or is tau, which was rounded to one.
struct BFloat16 {
  using Storage = uint16_t;
  static inline Pair load_pair(const uint16_t* p) {
    Pair v;
    load_even_odd(p, v.a, v.b);
    return v;
  }
  static inline void store_pair(uint16_t* p, Pair v) { store_even_odd(p, v.a, v.b); }
  static inline void store_pair_f32(float* p, Pair v) { store_zipped(p, v.a, v.b); }
  static inline int index(int part, int lane) { return 2 * lane + part; }
};

// ---- Philox

struct KeySchedule {
  Counters k0[kPhiloxRounds], k1[kPhiloxRounds];
};

inline KeySchedule key_schedule(const PruneSpec& spec) {
  KeySchedule keys;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto steps = static_cast<uint32_t>(round);
    keys.k0[round] = broadcast_counter(spec.key.word[0] + steps * kPhiloxWeyl0);
    keys.k1[round] = broadcast_counter(spec.key.word[1] + steps * kPhiloxWeyl1);
  }
  return keys;
}

struct State {
  Counters x0, x1, x2, x3;
};

// Words for a pair of vectors of a block.
struct WordPair {
  Words a, b;
};

// Numbers of a block's counters in the order of the lanes of a state, and the words of its
// elements, in the order of Element's pairs.
template <class Element>
inline const uint64_t* counter_order();
template <class Element>
inline WordPair block_words(const State& s);

template <>
inline const uint64_t* counter_order<Float32>() {
  return kUnpackOrder;
}
template <>
inline WordPair block_words<Float32>(const State& s) {
  const Counters x01 = interleave(s.x0, s.x1), x23 = interleave(s.x2, s.x3);
  return {unpack_low(x01, x23), unpack_high(x01, x23)};
}

template <>
inline const uint64_t* counter_order<BFloat16>() {
  return kLaneNumbers;
}
template <>
inline WordPair block_words<BFloat16>(const State& s) {
  return {words_of(interleave(s.x0, s.x2)), words_of(interleave(s.x1, s.x3))};
}

// The rounds from number First (counted from 0) on, of a group of independent states.
template <int First>
inline void finish(State (&s)[kGroup], const KeySchedule& keys) {
  const Counters m0 = broadcast_counter(kPhiloxMultiplier0);
  const Counters m1 = broadcast_counter(kPhiloxMultiplier1);
#pragma GCC unroll 8
  for (int round = First; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const Counters p0 = multiply(s[i].x0, m0), p1 = multiply(s[i].x2, m1);
      s[i] = {xor3(high(p1), s[i].x1, keys.k0[round]), p1, xor3(high(p0), s[i].x3, keys.k1[round]),
              p0};
    }
  }
}

// The first round of counters (w, h, n, c4) with one n for all.
inline State first_round(Counters w, Counters h, uint32_t n, Counters c4, const KeySchedule& keys) {
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * n;
  const Counters p0 = multiply(w, broadcast_counter(kPhiloxMultiplier0));
  return {xor3(h, broadcast_counter(p1 >> 32), keys.k0[0]), broadcast_counter(p1),
          xor3(high(p0), c4, keys.k1[0]), p0};
}

// Pixels of a row. What all counters of a pixel have in common is computed once: the first round
// but for one xor, and half of each of the next two.
constexpr int kPixels = 64;
constexpr int kPixelsMax = kPixels + kGroup + kCounters;  // a group may reach past the last pixel

struct PixelStates {
  Counters x0_round2, x2_round3;  // common to the row
  uint64_t x2_round1[kPixelsMax], x0_round3[kPixelsMax], x1_round3[kPixelsMax];
};

inline void start_pixels(PixelStates& states, const PruneSpec& spec, const KeySchedule& keys,
                         uint32_t n, uint32_t h, uint32_t w, int64_t pixels) {
  const Counters m0 = broadcast_counter(kPhiloxMultiplier0);
  const Counters m1 = broadcast_counter(kPhiloxMultiplier1);
  const uint64_t round1_p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * n;
  const uint32_t round1_x0 =
      static_cast<uint32_t>(round1_p1 >> 32) ^ h ^ spec.h_xor ^ spec.key.word[0];
  const uint64_t round2_p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * round1_x0;
  const Counters round2_x2 = xor2(broadcast_counter(round2_p0 >> 32), keys.k1[1]);
  states.x0_round2 = xor2(broadcast_counter(round1_p1), keys.k0[1]);
  states.x2_round3 = xor2(broadcast_counter(round2_p0), keys.k1[2]);
  for (int64_t i = 0; i < pixels + kGroup; i += kCounters) {
    const Counters column =
        add(broadcast_counter(w + static_cast<uint32_t>(i)), load_counters(kLaneNumbers));
    const Counters round1_p0 = multiply(xor2(column, broadcast_counter(spec.w_xor)), m0);
    const Counters round3_p1 = multiply(xor2(round1_p0, round2_x2), m1);
    store(states.x2_round1 + i, xor2(high(round1_p0), keys.k1[0]));
    store(states.x0_round3 + i, xor2(high(round3_p1), keys.k0[2]));
    store(states.x1_round3 + i, round3_p1);
  }
}

// The first three rounds of the counters of a pixel, from number c4 on, in the order that
// block_words<Element> needs.
template <class Element>
inline State three_rounds(const PixelStates& states, int64_t pixel, uint64_t c4) {
  // c4 is a multiple of the number of lanes: xor adds it to the lanes' own numbers.
  const Counters round1_x2 = xor2(load_counters(counter_order<Element>()),
                                  broadcast_counter(c4 ^ states.x2_round1[pixel]));
  const Counters p1 = multiply(round1_x2, broadcast_counter(kPhiloxMultiplier1));
  const Counters p0 =
      multiply(xor2(high(p1), states.x0_round2), broadcast_counter(kPhiloxMultiplier0));
  return {xor2(p1, broadcast_counter(states.x0_round3[pixel])),
          broadcast_counter(states.x1_round3[pixel]), xor2(high(p0), states.x2_round3), p0};
}

// Positions (outer, inner) of counters along a grid whose rows are `width` long: lane i starts
// offsets[i] < kLanes positions after the given one.
struct Walk {
  Counters outer, inner;
};

inline Walk walk_from(uint32_t outer, uint32_t inner, uint32_t width, const uint64_t* offsets) {
  uint32_t outers[kLanes], inners[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    outers[i] = outer;
    inners[i] = inner;
    if (++inner == width) {
      inner = 0;
      ++outer;
    }
  }
  uint64_t lane_outers[kCounters], lane_inners[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    lane_outers[i] = outers[offsets[i]];
    lane_inners[i] = inners[offsets[i]];
  }
  return {load_counters(lane_outers), load_counters(lane_inners)};
}

struct WalkStep {
  Counters outer, inner, width;
};

inline WalkStep walk_step(uint32_t positions, uint32_t width) {
  return {broadcast_counter(positions / width), broadcast_counter(positions % width),
          broadcast_counter(width)};
}

inline void advance(Walk& walk, const WalkStep& step) {
  walk.outer = add(walk.outer, step.outer);
  walk.inner = add(walk.inner, step.inner);
  carry(walk.inner, walk.outer, step.width);
}

// ---- pruning vectors and blocks

struct Pruner {
  Floats tau, scale;  // scale * (the 24 random bits as `random_bits` gives them) = tau * r
  Words nonzeros;  // in each lane, the number of elements that pruning left

  // With t = tau * r, t < tau: the magnitude becomes max(|g|, tau) where |g| > t, else 0.
  inline Floats operator()(Floats g, Words words) {
    return keep_above(g, multiply(scale, random_bits(words)), tau, nonzeros);
  }
};

// Below this threshold scale could be inexact and t could round to tau: such gradients go to
// the baseline.
constexpr float kSmallestTau = 0x1p-90f;

inline Pruner make_pruner(float tau) {
  return {broadcast_float(tau), broadcast_float(tau * kRandomUnit), zero_words()};
}

// The block that is so many elements on: between tiles, what lists them drives their source and result out
// of the hardware's sight, and to fetch a tile at once would stall.
constexpr int64_t kAhead = 2048;

template <class Storage>
inline void fetch_ahead(const Storage* g, const Storage* out) {
  for (int64_t i = 0; i < kBlock; i += 64 / static_cast<int64_t>(sizeof(Storage))) {
    __builtin_prefetch(g + kAhead + i);
    if (out) __builtin_prefetch(out + kAhead + i, 1);
  }
}

// kBlock elements of channels_last order.
template <class Element, bool kOut, bool kF32>
inline void prune_block(const typename Element::Storage* g, typename Element::Storage* out,
                        float* out_f32, const State& state, Pruner& pruner) {
  const WordPair words = block_words<Element>(state);
  Pair v = Element::load_pair(g);
  v = {pruner(v.a, words.a), pruner(v.b, words.b)};
  if (kOut) Element::store_pair(out, v);
  if (kF32) Element::store_pair_f32(out_f32, v);
}

// A block that only its first `count` elements fill. Returns the number of non-zeros.
template <class Element>
__attribute__((noinline)) int64_t prune_part(const typename Element::Storage* g,
                                             typename Element::Storage* out, float* out_f32,
                                             int64_t count, State state, float tau) {
  Pruner pruner = make_pruner(tau);
  typename Element::Storage buffer[kBlock] = {};
  float buffer_f32[kBlock];
  const auto size = static_cast<size_t>(count);
  memcpy(buffer, g, size * sizeof(*buffer));
  prune_block<Element, true, true>(buffer, buffer, buffer_f32, state, pruner);
  if (out) memcpy(out, buffer, size * sizeof(*buffer));
  if (out_f32) memcpy(out_f32, buffer_f32, size * sizeof(*buffer_f32));
  return sum(pruner.nonzeros);
}

// ---- channels_last

struct Row {
  int64_t pixel_stride, f32_stride;
  uint32_t n, h, w;
  int64_t pixels, channels;
};

// Many channels: the blocks of a pixel, pixel by pixel; the last block of a pixel may be a part.
template <class Element, bool kOut, bool kF32>
int64_t prune_wide_row(const typename Element::Storage* g, typename Element::Storage* out,
                       float* out_f32, const Row& row, const PruneSpec& spec) {
  const KeySchedule keys = key_schedule(spec);
  Pruner pruner = make_pruner(spec.tau);
  int64_t nonzeros = 0;
  const int64_t blocks = (row.channels + kBlock - 1) / kBlock;
  const int64_t last_count = row.channels - (blocks - 1) * kBlock;
  PixelStates states;
  for (int64_t first = 0; first < row.pixels; first += kPixels) {
    const int64_t pixels = row.pixels - first < kPixels ? row.pixels - first : kPixels;
    start_pixels(states, spec, keys, row.n, row.h, row.w + static_cast<uint32_t>(first), pixels);
    int64_t pixel = 0, block = 0;
    int64_t offset = first * row.pixel_stride, offset_f32 = first * row.f32_stride;
    while (pixel < pixels) {
      // The last group may reach past the last pixel; such blocks have a count of 0.
      State group[kGroup];
      int64_t at[kGroup], at_f32[kGroup], count[kGroup];
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        group[i] = three_rounds<Element>(states, pixel, static_cast<uint64_t>(block) * kCounters);
        at[i] = offset + block * kBlock;
        at_f32[i] = offset_f32 + block * kBlock;
        fetch_ahead(g + at[i], kOut ? out + at[i] : nullptr);
        count[i] = pixel < pixels ? kBlock : 0;
        if (++block == blocks) {
          if (count[i]) count[i] = last_count;
          block = 0;
          ++pixel;
          offset += row.pixel_stride;
          offset_f32 += row.f32_stride;
        }
      }
      finish<3>(group, keys);
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        if (__builtin_expect(count[i] == kBlock, 1))
          prune_block<Element, kOut, kF32>(g + at[i], kOut ? out + at[i] : nullptr,
                                           kF32 ? out_f32 + at_f32[i] : nullptr, group[i], pruner);
        else if (count[i] > 0)
          nonzeros += prune_part<Element>(g + at[i], kOut ? out + at[i] : nullptr,
                                          kF32 ? out_f32 + at_f32[i] : nullptr, count[i], group[i],
                                          spec.tau);
      }
    }
  }
  return nonzeros + sum(pruner.nonzeros);
}

// The block of a narrow row that starts at counter `first`, with its elements wherever they are.
// Returns the number of non-zeros.
template <class Element>
__attribute__((noinline)) int64_t prune_scattered(const typename Element::Storage* g,
                                                  typename Element::Storage* out, float* out_f32,
                                                  const Row& row, int64_t first, State state,
                                                  float tau) {
  const int64_t quads = (row.channels + 3) / 4;
  int64_t pixel = first / quads, channel = first % quads * 4;
  int64_t at[kBlock], at_f32[kBlock];  // -1: a slot with no element
  for (int slot = 0; slot < kBlock; slot += 4) {
    for (int j = 0; j < 4; ++j) {
      const bool exists = pixel < row.pixels && channel + j < row.channels;
      at[slot + j] = exists ? pixel * row.pixel_stride + channel + j : -1;
      at_f32[slot + j] = pixel * row.f32_stride + channel + j;
    }
    channel += 4;
    if (channel >= row.channels) {
      channel = 0;
      ++pixel;
    }
  }
  Pruner pruner = make_pruner(tau);
  typename Element::Storage buffer[kBlock] = {};
  float buffer_f32[kBlock];
  for (int slot = 0; slot < kBlock; ++slot)
    if (at[slot] >= 0) buffer[slot] = g[at[slot]];
  prune_block<Element, true, true>(buffer, buffer, buffer_f32, state, pruner);
  for (int slot = 0; slot < kBlock; ++slot) {
    if (at[slot] < 0) continue;
    if (out) out[at[slot]] = buffer[slot];
    if (out_f32) out_f32[at_f32[slot]] = buffer_f32[slot];
  }
  return sum(pruner.nonzeros);
}

// Few channels: a block spans pixels, with four slots for each counter even where C % 4 != 0.
template <class Element, bool kOut, bool kF32>
int64_t prune_narrow_row(const typename Element::Storage* g, typename Element::Storage* out,
                         float* out_f32, const Row& row, const PruneSpec& spec) {
  const KeySchedule keys = key_schedule(spec);
  Pruner pruner = make_pruner(spec.tau);
  int64_t nonzeros = 0;
  const int64_t quads = (row.channels + 3) / 4;
  const int64_t counters = row.pixels * quads;
  const bool dense = row.channels % 4 == 0 && row.pixel_stride == row.channels &&
                     (!kF32 || row.f32_stride == row.channels);
  Walk walk = walk_from(row.w, 0, static_cast<uint32_t>(quads), counter_order<Element>());
  const WalkStep step = walk_step(kCounters, static_cast<uint32_t>(quads));
  const Counters w_xor = broadcast_counter(spec.w_xor);
  const Counters h = broadcast_counter(row.h ^ spec.h_xor);
  for (int64_t begin = 0; begin < counters; begin += kGroup * kCounters) {
    State group[kGroup];
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      group[i] = first_round(xor2(walk.outer, w_xor), h, row.n, walk.inner, keys);
      advance(walk, step);
    }
    finish<1>(group, keys);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      const int64_t c = begin + i * kCounters;
      fetch_ahead(g + 4 * c, kOut ? out + 4 * c : nullptr);
      if (dense && c + kCounters <= counters) {
        prune_block<Element, kOut, kF32>(g + 4 * c, kOut ? out + 4 * c : nullptr,
                                         kF32 ? out_f32 + 4 * c : nullptr, group[i], pruner);
      } else if (c < counters) {
        nonzeros += prune_scattered<Element>(g, kOut ? out : nullptr, kF32 ? out_f32 : nullptr, row,
                                             c, group[i], spec.tau);
      }
    }
  }
  return nonzeros + sum(pruner.nonzeros);
}

template <class Element>
int64_t prune_row(const void* g_data, void* out_data, float* out_f32, const Row& row,
                  const PruneSpec& spec) {
  const auto* g = static_cast<const typename Element::Storage*>(g_data);
  auto* out = static_cast<typename Element::Storage*>(out_data);
  // A wide row computes up to a block of random numbers too many for each pixel.
  if (row.channels % kBlock == 0 || row.channels >= 4 * kBlock) {
    if (out && out_f32) return prune_wide_row<Element, true, true>(g, out, out_f32, row, spec);
    if (out_f32) return prune_wide_row<Element, false, true>(g, out, out_f32, row, spec);
    return prune_wide_row<Element, true, false>(g, out, out_f32, row, spec);
  }
  if (out && out_f32) return prune_narrow_row<Element, true, true>(g, out, out_f32, row, spec);
  if (out_f32) return prune_narrow_row<Element, false, true>(g, out, out_f32, row, spec);
  return prune_narrow_row<Element, true, false>(g, out, out_f32, row, spec);
}

// ---- not pruning

template <class Element, bool kOut, bool kF32>
int64_t load_row(const typename Element::Storage* g, typename Element::Storage* out, float* out_f32,
                 int64_t pixel_stride, int64_t f32_stride, int64_t pixels, int64_t channels) {
  if (pixel_stride == channels && (!kF32 || f32_stride == channels)) {
    channels *= pixels;
    pixels = 1;
  }
  const int64_t whole = channels / kBlock * kBlock;
  const auto rest = static_cast<size_t>(channels - whole);
  Words nonzeros = zero_words();
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < whole; c += kBlock) {
      fetch_ahead(g + c, kOut ? out + c : nullptr);
      const Pair v = Element::load_pair(g + c);
      count_nonzeros(v.a, nonzeros);
      count_nonzeros(v.b, nonzeros);
      if (kOut) Element::store_pair(out + c, v);
      if (kF32) Element::store_pair_f32(out_f32 + c, v);
    }
    if (rest) {
      typename Element::Storage buffer[kBlock] = {};
      float buffer_f32[kBlock];
      memcpy(buffer, g + whole, rest * sizeof(*buffer));
      const Pair v = Element::load_pair(buffer);
      count_nonzeros(v.a, nonzeros);
      count_nonzeros(v.b, nonzeros);
      Element::store_pair_f32(buffer_f32, v);
      if (kOut) memcpy(out + whole, buffer, rest * sizeof(*buffer));
      if (kF32) memcpy(out_f32 + whole, buffer_f32, rest * sizeof(*buffer_f32));
    }
    g += pixel_stride;
    if (kOut) out += pixel_stride;
    if (kF32) out_f32 += f32_stride;
  }
  return sum(nonzeros);
}

template <class Element>
int64_t load_pixels(const void* g_data, int64_t pixel_stride, void* out_data, float* out_f32,
                    int64_t f32_stride, int64_t pixels, int64_t channels) {
  const auto* g = static_cast<const typename Element::Storage*>(g_data);
  auto* out = static_cast<typename Element::Storage*>(out_data);
  const auto kernel = out && out_f32 ? &load_row<Element, true, true>
                      : out          ? &load_row<Element, true, false>
                      : out_f32      ? &load_row<Element, false, true>
                                     : &load_row<Element, false, false>;
  return kernel(g, out, out_f32, pixel_stride, f32_stride, pixels, channels);
}

// ---- contiguous (NCHW)

// kLanes pixels of eight planes at a time; even and odd pixels have a state each.
template <class Element>
int64_t prune_planes(const void* g_data, void* out_data, int64_t plane_stride, uint32_t n,
                     int64_t c_begin, int64_t c_end, int64_t first, int64_t pixels, int64_t width,
                     const PruneSpec& spec) {
  using Storage = typename Element::Storage;
  constexpr int kPlanes = 2 * kGroup;
  const KeySchedule keys = key_schedule(spec);
  Pruner pruner = make_pruner(spec.tau);
  uint64_t even[kCounters], odd[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    even[i] = static_cast<uint64_t>(2 * i);
    odd[i] = even[i] + 1;
  }
  const auto h = static_cast<uint32_t>(first / width), w = static_cast<uint32_t>(first % width);
  const auto row_length = static_cast<uint32_t>(width);
  const Walk starts[2] = {walk_from(h, w, row_length, even), walk_from(h, w, row_length, odd)};
  const WalkStep step = walk_step(kLanes, row_length);
  const Counters w_xor = broadcast_counter(spec.w_xor), h_xor = broadcast_counter(spec.h_xor);
  for (int64_t c = c_begin; c < c_end; c += kPlanes) {
    const int planes = c_end - c < kPlanes ? static_cast<int>(c_end - c) : kPlanes;
    const int64_t offset = (c - c_begin) * plane_stride + first;
    const auto* g = static_cast<const Storage*>(g_data) + offset;
    auto* out = static_cast<Storage*>(out_data) + offset;
    Walk walks[2] = {starts[0], starts[1]};
    for (int64_t i = 0; i < pixels; i += kLanes) {
      State group[kGroup];
#pragma GCC unroll 8
      for (int k = 0; k < kGroup; ++k) {
        const Walk& walk = walks[k % 2];
        const auto c4 = static_cast<uint32_t>(c / 4 + k / 2);
        group[k] = first_round(xor2(walk.inner, w_xor), xor2(walk.outer, h_xor), n,
                               broadcast_counter(c4), keys);
      }
      advance(walks[0], step);
      advance(walks[1], step);
      finish<1>(group, keys);
      Words words[kPlanes];
#pragma GCC unroll 8
      for (int k = 0; k < kGroup / 2; ++k) {
        const State &a = group[2 * k], &b = group[2 * k + 1];
        words[4 * k] = words_of(interleave(a.x0, b.x0));
        words[4 * k + 1] = words_of(interleave(a.x1, b.x1));
        words[4 * k + 2] = words_of(interleave(a.x2, b.x2));
        words[4 * k + 3] = words_of(interleave(a.x3, b.x3));
      }
      if (planes == kPlanes && pixels - i >= kLanes) {
#pragma GCC unroll 8
        for (int j = 0; j < kPlanes; ++j)
          store(out + j * plane_stride + i, pruner(load(g + j * plane_stride + i), words[j]));
        continue;
      }
      const auto size =
          static_cast<size_t>(pixels - i < kLanes ? pixels - i : kLanes) * sizeof(Storage);
      for (int j = 0; j < planes; ++j) {
        Storage buffer[kLanes] = {};
        memcpy(buffer, g + j * plane_stride + i, size);
        store(buffer, pruner(load(buffer), words[j]));
        memcpy(out + j * plane_stride + i, buffer, size);
      }
    }
  }
  return sum(pruner.nonzeros);
}

// ---- sum of magnitudes

template <class Element>
double abs_sum(const void* data, int64_t count, int64_t* nonzeros) {
  const auto* g = static_cast<const typename Element::Storage*>(data);
  constexpr int kPairs = kPartialSums / kBlock;
  Doubles sums[kPairs][2][2];  // of [pair][vector of the pair][half of the vector]
  for (auto& pair : sums)
    for (auto& part : pair) part[0] = part[1] = zero_doubles();
  Words found = zero_words();
  const auto add_elements = [&](const typename Element::Storage* chunk) {
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      const Pair v = Element::load_pair(chunk + i * kBlock);
      const Floats parts[2] = {absolute(v.a), absolute(v.b)};
#pragma GCC unroll 8
      for (int part = 0; part < 2; ++part) {
        count_nonzeros(parts[part], found);
        sums[i][part][0] = add(sums[i][part][0], widen_low(parts[part]));
        sums[i][part][1] = add(sums[i][part][1], widen_high(parts[part]));
      }
    }
  };
  int64_t i = 0;
  for (; i + kPartialSums <= count; i += kPartialSums) add_elements(g + i);
  if (i < count) {
    typename Element::Storage buffer[kPartialSums] = {};
    memcpy(buffer, g + i, static_cast<size_t>(count - i) * sizeof(*buffer));
    add_elements(buffer);
  }
  double partial[kPartialSums];
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int part = 0; part < 2; ++part) {
      double lanes[kLanes];
      store(lanes, sums[pair][part][0]);
      store(lanes + kCounters, sums[pair][part][1]);
      for (int lane = 0; lane < kLanes; ++lane)
        partial[pair * kBlock + Element::index(part, lane)] = lanes[lane];
    }
  }
  for (int half = kPartialSums / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) partial[j] += partial[j + half];
  *nonzeros = sum(found);
  return partial[0];
}

// ---- the table

double abs_sum_any(const void* g, DType dtype, int64_t count, int64_t* nonzeros) {
  return dtype == DType::kFloat32 ? abs_sum<Float32>(g, count, nonzeros)
                                  : abs_sum<BFloat16>(g, count, nonzeros);
}

int64_t load_pixels_nhwc(const void* g, DType dtype, int64_t pixel_stride, void* out,
                         float* out_f32, int64_t f32_stride, int64_t pixels, int64_t channels) {
  const auto kernel = dtype == DType::kFloat32 ? &load_pixels<Float32> : &load_pixels<BFloat16>;
  return kernel(g, pixel_stride, out, out_f32, f32_stride, pixels, channels);
}

int64_t prune_pixels_nhwc(const void* g, DType dtype, int64_t pixel_stride, void* out,
                          float* out_f32, int64_t f32_stride, uint32_t n, uint32_t h, uint32_t w,
                          int64_t pixels, int64_t channels, const PruneSpec& spec) {
  if (spec.tau == 0.0f)
    return load_pixels_nhwc(g, dtype, pixel_stride, out, out_f32, f32_stride, pixels, channels);
  if (spec.tau < kSmallestTau)
    return prune_kernels_baseline.prune_pixels_nhwc(g, dtype, pixel_stride, out, out_f32,
                                                    f32_stride, n, h, w, pixels, channels, spec);
  const Row row = {pixel_stride, f32_stride, n, h, w, pixels, channels};
  return dtype == DType::kFloat32 ? prune_row<Float32>(g, out, out_f32, row, spec)
                                  : prune_row<BFloat16>(g, out, out_f32, row, spec);
}

int64_t prune_planes_nchw(const void* g, DType dtype, int64_t plane_stride, void* out, uint32_t n,
                          int64_t c_begin, int64_t c_end, int64_t first, int64_t pixels,
                          int64_t width, const PruneSpec& spec) {
  if (spec.tau < kSmallestTau)
    return prune_kernels_baseline.prune_planes_nchw(g, dtype, plane_stride, out, n, c_begin, c_end,
                                                    first, pixels, width, spec);
  const auto kernel = dtype == DType::kFloat32 ? &prune_planes<Float32> : &prune_planes<BFloat16>;
  return kernel(g, out, plane_stride, n, c_begin, c_end, first, pixels, width, spec);
}
