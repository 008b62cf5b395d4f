// SPDX-License-Identifier: Apache-2.0
// The depthwise kernels, over the vector types of one instruction set: include vec_<isa>.h first.
#include <stddef.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "depthwise_kernels.h"

namespace sparsebwd {
namespace {

constexpr int kLanes = Vec::kLanes;

// ---- AGB and WGC

// Pixels at a time: they share the loads of the weights. With the sums of the weight's gradient,
// both operands of each pixel and two for what is loaded they fill 16 registers.
constexpr int pixels_at_once(int taps) { return taps <= 5 ? 4 : taps <= 7 ? 3 : 2; }

template <int Taps, bool Agb, bool Wgc>
struct Depthwise {
  template <int Pixels>
  static inline __attribute__((always_inline)) void step(const DepthwiseRun& run, const float* g,
                                                         const float* x, float* dx,
                                                         Vec (&sums)[Taps]) {
    Vec values[Pixels], results[Pixels];
    for (int i = 0; i < Pixels; ++i) {
      if (Wgc) values[i] = Vec::load(x + i * run.x_step);
      if (Agb) results[i] = run.accumulate ? Vec::load(dx + i * run.dx_step) : Vec::zero();
    }
    for (int t = 0; t < Taps; ++t) {
      const float* from = g + run.offsets[t];
      Vec weight;
      if (Agb) weight = Vec::load(run.weight + t * kLanes);
      for (int i = 0; i < Pixels; ++i) {
        const Vec gradient = Vec::load(from + i * kLanes);
        if (Agb) results[i] = results[i].fma(gradient, weight);
        if (Wgc) sums[t] = sums[t].fma(gradient, values[i]);
      }
    }
    if (Agb)
      for (int i = 0; i < Pixels; ++i) results[i].store(dx + i * run.dx_step);
  }

  static void run(const DepthwiseRun& run) {
    constexpr int kPixels = pixels_at_once(Taps);
    Vec sums[Taps];
    for (int t = 0; t < Taps; ++t) sums[t] = Vec::zero();
    for (int64_t row = 0; row < run.rows; ++row) {
      const float* g = run.g + row * run.g_pitch;
      const float* x = Wgc ? run.x + row * run.x_pitch : nullptr;
      float* dx = Agb ? run.dx + row * run.dx_pitch : nullptr;
      int64_t left = run.columns;
      auto advance = [&](auto pixels) __attribute__((always_inline)) {
        step<decltype(pixels)::value>(run, g, x, dx, sums);
        g += pixels * kLanes;
        if (Wgc) x += pixels * run.x_step;
        if (Agb) dx += pixels * run.dx_step;
        left -= pixels;
      };
      while (left >= kPixels) advance(std::integral_constant<int, kPixels>());
      if (kPixels > 2 && left >= 2) advance(std::integral_constant<int, 2>());
      if (left > 0) advance(std::integral_constant<int, 1>());
    }
    if (Wgc)
      for (int t = 0; t < Taps; ++t) {
        float* sum = run.grad_weight + t * kLanes;
        (Vec::load(sum) + sums[t]).store(sum);
      }
  }
};

// ---- tiles

inline void convert(float value, float* to) { *to = value; }
inline void convert(float value, uint16_t* to) { *to = bfloat16_of_float(value); }
inline void convert(uint16_t value, float* to) { *to = float_of_bfloat16(value); }

// `count` elements and zeros behind, kLanes in all.
inline Vec load_first(const float* p, int64_t count) { return Vec::load_first(p, count); }
inline Vec load_first(const uint16_t* p, int64_t count) {
  uint16_t lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Vec::load(lanes);
}
inline void store_first(Vec v, float* p, int64_t count) { v.store_first(p, count); }
inline void store_first(Vec v, uint16_t* p, int64_t count) {
  uint16_t lanes[kLanes];
  v.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// Calls f(first pixel, number of pixels) for all pixels, kLanes at a time: the last ones overlap
// those before where there are enough.
template <class F>
inline __attribute__((always_inline)) void for_blocks(int64_t pixels, F f) {
  int64_t i = 0;
  for (; i + kLanes <= pixels; i += kLanes) f(i, kLanes);
  if (i == pixels) return;
  if (pixels >= kLanes) f(pixels - kLanes, kLanes);
  else f(0, pixels);
}

template <class T>
void gather(const DepthwisePixels& from, const DepthwiseTile& to) {
  const T* const data = static_cast<const T*>(from.data);
  if (from.channel_stride == 1) {
    const int64_t whole = from.channels / kLanes, rest = from.channels % kLanes;
    for (int64_t i = 0; i < from.pixels; ++i) {
      const T* p = data + i * from.pixel_stride;
      float* dst = to.data + to.offsets[i];
      for (int64_t j = 0; j < whole; ++j, p += kLanes, dst += to.vector_stride)
        Vec::load(p).store(dst);
      if (rest) load_first(p, rest).store(dst);
    }
    return;
  }
  float* dst = to.data;
  for (int64_t c = 0; c < from.channels; c += kLanes, dst += to.vector_stride) {
    const T* const first = data + c * from.channel_stride;
    const int64_t channels = std::min<int64_t>(from.channels - c, kLanes);
    if (from.pixel_stride == 1) {
      for_blocks(from.pixels, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        Vec tile[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          const T* p = first + j * from.channel_stride + i;
          tile[j] = j >= channels     ? Vec::zero()
                    : count == kLanes ? Vec::load(p)
                                      : load_first(p, count);
        }
        transpose(tile);
        for (int j = 0; j < count; ++j) tile[j].store(dst + to.offsets[i + j]);
      });
    } else {
      for (int64_t i = 0; i < from.pixels; ++i)
        for (int64_t j = 0; j < kLanes; ++j) {
          float* const lane = dst + to.offsets[i] + j;
          if (j < channels) convert(first[i * from.pixel_stride + j * from.channel_stride], lane);
          else *lane = 0.0f;
        }
    }
  }
}

template <class T>
void scatter(const DepthwiseTile& from, const DepthwisePixels& to, bool stream) {
  T* const data = static_cast<T*>(to.data);
  if (to.channel_stride == 1) {
    const int64_t whole = to.channels / kLanes, rest = to.channels % kLanes;
    constexpr uintptr_t kBytes = kLanes * sizeof(float);
    stream = stream && std::is_same<T, float>::value &&
             (reinterpret_cast<uintptr_t>(data) | to.pixel_stride * sizeof(float)) % kBytes == 0;
    for (int64_t i = 0; i < to.pixels; ++i) {
      const float* src = from.data + from.offsets[i];
      T* p = data + i * to.pixel_stride;
      for (int64_t j = 0; j < whole; ++j, p += kLanes, src += from.vector_stride) {
        if (stream) Vec::load(src).stream(reinterpret_cast<float*>(p));
        else Vec::load(src).store(p);
      }
      if (rest) store_first(Vec::load(src), p, rest);
    }
    return;
  }
  const float* src = from.data;
  for (int64_t c = 0; c < to.channels; c += kLanes, src += from.vector_stride) {
    T* const first = data + c * to.channel_stride;
    const int64_t channels = std::min<int64_t>(to.channels - c, kLanes);
    for_blocks(to.pixels, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      Vec tile[kLanes];
      for (int j = 0; j < kLanes; ++j)
        tile[j] = j < count ? Vec::load(src + from.offsets[i + j]) : Vec::zero();
      transpose(tile);
      for (int j = 0; j < channels; ++j) {
        T* p = first + j * to.channel_stride + i;
        if (count == kLanes) tile[j].store(p);
        else store_first(tile[j], p, count);
      }
    });
  }
}

void gather_any(const DepthwisePixels& from, const DepthwiseTile& to) {
  from.dtype == DType::kFloat32 ? gather<float>(from, to) : gather<uint16_t>(from, to);
}

void scatter_any(const DepthwiseTile& from, const DepthwisePixels& to, bool stream) {
  to.dtype == DType::kFloat32 ? scatter<float>(from, to, stream)
                              : scatter<uint16_t>(from, to, stream);
}

// ---- the table

template <int... Index>
constexpr DepthwiseKernels make_kernels(std::integer_sequence<int, Index...>) {
  return {kLanes,
          {Depthwise<Index + 1, true, true>::run...},
          {Depthwise<Index + 1, true, false>::run...},
          {Depthwise<Index + 1, false, true>::run...},
          gather_any,
          scatter_any,
          Vec::finish_stores};
}

constexpr DepthwiseKernels kDepthwiseKernels =
    make_kernels(std::make_integer_sequence<int, kMostTaps>());

}  // namespace
}  // namespace sparsebwd
