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
constexpr int kPartialSums = 32;       // of the definition of abs_sum

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

// The rounds from number First (counted from 0) on.
template <int First>
inline State finish(State s, const KeySchedule& keys) {
  const Counters m0 = broadcast_counter(kPhiloxMultiplier0);
  const Counters m1 = broadcast_counter(kPhiloxMultiplier1);
#pragma GCC unroll 8
  for (int round = First; round < kPhiloxRounds; ++round) {
    const Counters p0 = multiply(s.x0, m0), p1 = multiply(s.x2, m1);
    s = {xor3(high(p1), s.x1, keys.k0[round]), p1, xor3(high(p0), s.x3, keys.k1[round]), p0};
  }
  return s;
}

// Words of counters (w, h, n, c4) with one n for all.
inline State philox(Counters w, Counters h, uint32_t n, Counters c4, const KeySchedule& keys) {
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * n;
  const Counters p0 = multiply(w, broadcast_counter(kPhiloxMultiplier0));
  return finish<1>({xor3(h, broadcast_counter(static_cast<uint32_t>(p1 >> 32)), keys.k0[0]),
                    broadcast_counter(static_cast<uint32_t>(p1)), xor3(high(p0), c4, keys.k1[0]),
                    p0},
                   keys);
}

// What the counters of a pixel have in common: the first round but for one xor, and half of each
// of the next two.
struct PixelState {
  Counters x2_round1, x0_round2, x0_round3, x1_round3, x2_round3;
};

inline PixelState pixel_state(const PruneSpec& spec, uint32_t n, uint32_t h, uint32_t w) {
  const uint32_t k0 = spec.key.word[0], k1 = spec.key.word[1];
  const uint64_t round1_p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * (w ^ spec.w_xor);
  const uint64_t round1_p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * n;
  const uint32_t x0 = static_cast<uint32_t>(round1_p1 >> 32) ^ h ^ spec.h_xor ^ k0;
  const uint64_t round2_p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * x0;
  const uint32_t x2 = static_cast<uint32_t>(round2_p0 >> 32) ^ static_cast<uint32_t>(round1_p0) ^
                      (k1 + kPhiloxWeyl1);
  const uint64_t round3_p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * x2;
  return {
      broadcast_counter(static_cast<uint32_t>(round1_p0 >> 32) ^ k1),
      broadcast_counter(static_cast<uint32_t>(round1_p1) ^ (k0 + kPhiloxWeyl0)),
      broadcast_counter(static_cast<uint32_t>(round3_p1 >> 32) ^ (k0 + 2 * kPhiloxWeyl0)),
      broadcast_counter(static_cast<uint32_t>(round3_p1)),
      broadcast_counter(static_cast<uint32_t>(round2_p0) ^ (k1 + 2 * kPhiloxWeyl1)),
  };
}

inline State philox(const PixelState& pixel, Counters c4, const KeySchedule& keys) {
  const Counters p1 = multiply(xor2(c4, pixel.x2_round1), broadcast_counter(kPhiloxMultiplier1));
  const Counters x0 = xor2(high(p1), pixel.x0_round2);
  const Counters p0 = multiply(x0, broadcast_counter(kPhiloxMultiplier0));
  return finish<3>(
      {xor2(p1, pixel.x0_round3), pixel.x1_round3, xor2(high(p0), pixel.x2_round3), p0}, keys);
}

// Positions (outer, inner) of counters along a grid whose rows are `width` long: lane i starts
// offsets[i] < kLanes positions after the given one.
struct Walk {
  Counters outer, inner;
};

inline Walk walk_from(uint32_t outer, uint32_t inner, uint32_t width, const int* offsets) {
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
  Floats tau;
  Words zeros;  // in each lane, the number of pruned elements that became zero

  inline Floats operator()(Floats g, Words words) {
    return prune_vector(g, tau, multiply(tau, uniform(words)), zeros);
  }
};

// Fills a buffer with what pruning keeps, so that it is not counted as zero.
template <class Element>
inline void pad(typename Element::Storage* buffer, int count) {
  for (int i = 0; i < count; i += kLanes)
    Element::store(buffer + i, broadcast_float(__builtin_inff()));
}

// kBlock elements of channels_last order; counter i of them is in lane kMemoryOrder^-1[i].
template <class Element, bool kOut, bool kF32>
inline void prune_block(const typename Element::Storage* g, typename Element::Storage* out,
                        float* out_f32, const State& state, Pruner& pruner) {
  const Counters x01 = interleave(state.x0, state.x1), x23 = interleave(state.x2, state.x3);
  const Floats first = pruner(Element::load(g), unpack_low(x01, x23));
  const Floats second = pruner(Element::load(g + kLanes), unpack_high(x01, x23));
  if (kOut) {
    Element::store(out, first);
    Element::store(out + kLanes, second);
  }
  if (kF32) {
    Float32::store(out_f32, first);
    Float32::store(out_f32 + kLanes, second);
  }
}

// ---- channels_last

struct Row {
  int64_t pixel_stride, f32_stride;
  uint32_t n, h, w;
  int64_t pixels, channels;
};

// Pixel by pixel.
template <class Element, bool kOut, bool kF32>
int64_t prune_wide_row(const typename Element::Storage* g, typename Element::Storage* out,
                       float* out_f32, const Row& row, const PruneSpec& spec) {
  const KeySchedule keys = key_schedule(spec);
  const Counters first_c4 = load_counters(kMemoryOrder);
  const Counters next_block = broadcast_counter(kCounters);
  Pruner pruner = {broadcast_float(spec.tau), zero_words()};
  const int64_t whole = row.channels / kBlock * kBlock;
  const auto rest = static_cast<size_t>(row.channels - whole);
  for (int64_t i = 0; i < row.pixels; ++i) {
    const PixelState pixel = pixel_state(spec, row.n, row.h, row.w + static_cast<uint32_t>(i));
    Counters c4 = first_c4;
    for (int64_t c = 0; c < whole; c += kBlock) {
      prune_block<Element, kOut, kF32>(g + c, kOut ? out + c : nullptr,
                                       kF32 ? out_f32 + c : nullptr, philox(pixel, c4, keys),
                                       pruner);
      c4 = add(c4, next_block);
    }
    if (rest) {
      typename Element::Storage buffer[kBlock];
      float buffer_f32[kBlock];
      pad<Element>(buffer, kBlock);
      memcpy(buffer, g + whole, rest * sizeof(*buffer));
      prune_block<Element, true, true>(buffer, buffer, buffer_f32, philox(pixel, c4, keys), pruner);
      if (kOut) memcpy(out + whole, buffer, rest * sizeof(*buffer));
      if (kF32) memcpy(out_f32 + whole, buffer_f32, rest * sizeof(*buffer_f32));
    }
    g += row.pixel_stride;
    if (kOut) out += row.pixel_stride;
    if (kF32) out_f32 += row.f32_stride;
  }
  return row.pixels * row.channels - sum(pruner.zeros);
}

// Few channels: a block spans pixels.
template <class Element, bool kOut, bool kF32>
int64_t prune_narrow_row(const typename Element::Storage* g, typename Element::Storage* out,
                         float* out_f32, const Row& row, const PruneSpec& spec) {
  const KeySchedule keys = key_schedule(spec);
  const int64_t quads = (row.channels + 3) / 4;
  const int64_t counters = row.pixels * quads;
  const bool dense = row.channels % 4 == 0 && row.pixel_stride == row.channels &&
                     (!kF32 || row.f32_stride == row.channels);
  Pruner pruner = {broadcast_float(spec.tau), zero_words()};
  int offsets[kCounters];
  for (int i = 0; i < kCounters; ++i) offsets[i] = static_cast<int>(kMemoryOrder[i]);
  Walk walk = walk_from(row.w, 0, static_cast<uint32_t>(quads), offsets);
  const WalkStep step = walk_step(kCounters, static_cast<uint32_t>(quads));
  const Counters w_xor = broadcast_counter(spec.w_xor);
  const Counters h = broadcast_counter(row.h ^ spec.h_xor);
  for (int64_t i = 0; i < counters; i += kCounters, advance(walk, step)) {
    const State state = philox(xor2(walk.outer, w_xor), h, row.n, walk.inner, keys);
    if (dense && i + kCounters <= counters) {
      prune_block<Element, kOut, kF32>(g + 4 * i, kOut ? out + 4 * i : nullptr,
                                       kF32 ? out_f32 + 4 * i : nullptr, state, pruner);
      continue;
    }
    typename Element::Storage buffer[kBlock];
    float buffer_f32[kBlock];
    // Calls visit(slot, pixel, channel, count) for each run of up to four channels.
    const auto for_each_quad = [&](const auto& visit) {
      int64_t pixel = i / quads, channel = i % quads * 4;
      for (int slot = 0; slot < kBlock && pixel < row.pixels; slot += 4) {
        visit(slot, pixel, channel,
              row.channels - channel < 4 ? static_cast<int>(row.channels - channel) : 4);
        channel += 4;
        if (channel >= row.channels) {
          channel = 0;
          ++pixel;
        }
      }
    };
    pad<Element>(buffer, kBlock);
    for_each_quad([&](int slot, int64_t pixel, int64_t channel, int count) {
      const auto* from = g + pixel * row.pixel_stride + channel;
      for (int j = 0; j < count; ++j) buffer[slot + j] = from[j];
    });
    prune_block<Element, true, true>(buffer, buffer, buffer_f32, state, pruner);
    for_each_quad([&](int slot, int64_t pixel, int64_t channel, int count) {
      if (kOut) {
        auto* to = out + pixel * row.pixel_stride + channel;
        for (int j = 0; j < count; ++j) to[j] = buffer[slot + j];
      }
      if (kF32) {
        auto* to = out_f32 + pixel * row.f32_stride + channel;
        for (int j = 0; j < count; ++j) to[j] = buffer_f32[slot + j];
      }
    });
  }
  return row.pixels * row.channels - sum(pruner.zeros);
}

template <class Element>
int64_t prune_row(const void* g_data, void* out_data, float* out_f32, const Row& row,
                  const PruneSpec& spec) {
  const auto* g = static_cast<const typename Element::Storage*>(g_data);
  auto* out = static_cast<typename Element::Storage*>(out_data);
  // A wide row wastes up to a block of random numbers for each pixel.
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
int64_t load_row(const typename Element::Storage* g, typename Element::Storage* out,
                 float* out_f32, int64_t pixel_stride, int64_t f32_stride, int64_t pixels,
                 int64_t channels) {
  if (pixel_stride == channels && (!kF32 || f32_stride == channels)) {
    channels *= pixels;
    pixels = 1;
  }
  const int64_t whole = channels / kLanes * kLanes;
  const auto rest = static_cast<size_t>(channels - whole);
  Words nonzeros = zero_words();
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Floats value = Element::load(g + c);
      count_nonzeros(value, nonzeros);
      if (kOut) Element::store(out + c, value);
      if (kF32) Float32::store(out_f32 + c, value);
    }
    if (rest) {
      typename Element::Storage buffer[kLanes] = {};
      float buffer_f32[kLanes];
      memcpy(buffer, g + whole, rest * sizeof(*buffer));
      const Floats value = Element::load(buffer);
      count_nonzeros(value, nonzeros);
      Float32::store(buffer_f32, value);
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

// kLanes pixels of up to four planes; even and odd pixels have a Counters vector each.
template <class Element>
int64_t prune_planes(const void* g_data, void* out_data, int64_t plane_stride, uint32_t n,
                     int64_t c_begin, int64_t c_end, int64_t first, int64_t pixels, int64_t width,
                     const PruneSpec& spec) {
  const KeySchedule keys = key_schedule(spec);
  Pruner pruner = {broadcast_float(spec.tau), zero_words()};
  int even[kCounters], odd[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  const auto h = static_cast<uint32_t>(first / width), w = static_cast<uint32_t>(first % width);
  const auto row_length = static_cast<uint32_t>(width);
  const Walk even_start = walk_from(h, w, row_length, even);
  const Walk odd_start = walk_from(h, w, row_length, odd);
  const WalkStep step = walk_step(kLanes, row_length);
  const Counters w_xor = broadcast_counter(spec.w_xor), h_xor = broadcast_counter(spec.h_xor);
  for (int64_t c = c_begin; c < c_end; c += 4) {
    const int planes = c_end - c < 4 ? static_cast<int>(c_end - c) : 4;
    const auto* g = static_cast<const typename Element::Storage*>(g_data) +
                    (c - c_begin) * plane_stride + first;
    auto* out =
        static_cast<typename Element::Storage*>(out_data) + (c - c_begin) * plane_stride + first;
    const Counters c4 = broadcast_counter(static_cast<uint32_t>(c / 4));
    Walk even_walk = even_start, odd_walk = odd_start;
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const State a =
          philox(xor2(even_walk.inner, w_xor), xor2(even_walk.outer, h_xor), n, c4, keys);
      const State b = philox(xor2(odd_walk.inner, w_xor), xor2(odd_walk.outer, h_xor), n, c4, keys);
      advance(even_walk, step);
      advance(odd_walk, step);
      const Words words[4] = {words_of(interleave(a.x0, b.x0)), words_of(interleave(a.x1, b.x1)),
                              words_of(interleave(a.x2, b.x2)), words_of(interleave(a.x3, b.x3))};
      if (pixels - i >= kLanes) {
        for (int j = 0; j < planes; ++j)
          Element::store(out + j * plane_stride + i,
                         pruner(Element::load(g + j * plane_stride + i), words[j]));
      } else {
        const auto rest = static_cast<size_t>(pixels - i);
        for (int j = 0; j < planes; ++j) {
          typename Element::Storage buffer[kLanes];
          pad<Element>(buffer, kLanes);
          memcpy(buffer, g + j * plane_stride + i, rest * sizeof(*buffer));
          Element::store(buffer, pruner(Element::load(buffer), words[j]));
          memcpy(out + j * plane_stride + i, buffer, rest * sizeof(*buffer));
        }
      }
    }
  }
  return (c_end - c_begin) * pixels - sum(pruner.zeros);
}

// ---- sum of magnitudes

template <class Element>
double abs_sum(const void* data, int64_t count, int64_t* nonzeros) {
  const auto* g = static_cast<const typename Element::Storage*>(data);
  constexpr int kVectors = kPartialSums / kCounters;  // a Doubles has as many lanes as a Counters
  Doubles sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = zero_doubles();
  Words found = zero_words();
  const auto add_chunk = [&](const typename Element::Storage* chunk) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v += 2) {
      const Floats value = Element::load(chunk + v * kCounters);
      count_nonzeros(value, found);
      const Floats magnitude = absolute(value);
      sums[v] = add(sums[v], widen_low(magnitude));
      sums[v + 1] = add(sums[v + 1], widen_high(magnitude));
    }
  };
  int64_t i = 0;
  for (; i + kPartialSums <= count; i += kPartialSums) add_chunk(g + i);
  if (i < count) {
    typename Element::Storage buffer[kPartialSums] = {};
    memcpy(buffer, g + i, static_cast<size_t>(count - i) * sizeof(*buffer));
    add_chunk(buffer);
  }
  double lanes[kPartialSums];
  for (int v = 0; v < kVectors; ++v) store(lanes + v * kCounters, sums[v]);
  for (int half = kPartialSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  *nonzeros = sum(found);
  return lanes[0];
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
  const Row row = {pixel_stride, f32_stride, n, h, w, pixels, channels};
  return dtype == DType::kFloat32 ? prune_row<Float32>(g, out, out_f32, row, spec)
                                  : prune_row<BFloat16>(g, out, out_f32, row, spec);
}

int64_t prune_planes_nchw(const void* g, DType dtype, int64_t plane_stride, void* out, uint32_t n,
                          int64_t c_begin, int64_t c_end, int64_t first, int64_t pixels,
                          int64_t width, const PruneSpec& spec) {
  const auto kernel = dtype == DType::kFloat32 ? &prune_planes<Float32> : &prune_planes<BFloat16>;
  return kernel(g, out, plane_stride, n, c_begin, c_end, first, pixels, width, spec);
}
