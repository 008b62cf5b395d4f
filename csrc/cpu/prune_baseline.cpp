// SPDX-License-Identifier: Apache-2.0
// Pruning kernels in portable C++.
#include "prune_kernels.h"

namespace sparsebwd {
namespace {

constexpr int kPartialSums = 32;

struct Float32 {
  using Storage = float;
  static float load(Storage value) { return value; }
  static Storage store(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(Storage value) { return float_of_bfloat16(value); }
  // Every value stored here came from a bfloat16 or is tau, which was rounded to one.
  static Storage store(float value) { return static_cast<Storage>(float_bits(value) >> 16); }
};

template <class Element>
double abs_sum(const void* data, int64_t count, int64_t* nonzeros) {
  const auto* g = static_cast<const typename Element::Storage*>(data);
  double sums[kPartialSums] = {};
  int64_t found = 0;
  int64_t i = 0;
  for (; i + kPartialSums <= count; i += kPartialSums) {
    for (int lane = 0; lane < kPartialSums; ++lane) {
      const float value = Element::load(g[i + lane]);
      sums[lane] += static_cast<double>(value < 0.0f ? -value : value);
      found += value != 0.0f;
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    const float value = Element::load(g[i]);
    sums[lane] += static_cast<double>(value < 0.0f ? -value : value);
    found += value != 0.0f;
  }
  for (int half = kPartialSums / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  *nonzeros = found;
  return sums[0];
}

template <class Element>
int64_t prune_pixels(const void* g_data, int64_t pixel_stride, void* out_data, float* out_f32,
                     int64_t f32_stride, uint32_t n, uint32_t h, uint32_t w, int64_t pixels,
                     int64_t channels, const PruneSpec& spec) {
  const auto* g = static_cast<const typename Element::Storage*>(g_data);
  auto* out = static_cast<typename Element::Storage*>(out_data);
  int64_t found = 0;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (int64_t c = 0; c < channels; c += 4) {
      const PhiloxCounter words =
          prune_words(spec, n, static_cast<uint32_t>(c / 4), h, w + static_cast<uint32_t>(pixel));
      for (int64_t j = 0; j < 4 && c + j < channels; ++j) {
        const float value =
            prune_element(Element::load(g[pixel * pixel_stride + c + j]), spec.tau, words.word[j]);
        if (out) out[pixel * pixel_stride + c + j] = Element::store(value);
        if (out_f32) out_f32[pixel * f32_stride + c + j] = value;
        found += value != 0.0f;
      }
    }
  }
  return found;
}

template <class Element>
int64_t load_pixels(const void* g_data, int64_t pixel_stride, void* out_data, float* out_f32,
                    int64_t f32_stride, int64_t pixels, int64_t channels) {
  const auto* g = static_cast<const typename Element::Storage*>(g_data);
  auto* out = static_cast<typename Element::Storage*>(out_data);
  int64_t found = 0;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (int64_t c = 0; c < channels; ++c) {
      const typename Element::Storage stored = g[pixel * pixel_stride + c];
      const float value = Element::load(stored);
      if (out) out[pixel * pixel_stride + c] = stored;
      if (out_f32) out_f32[pixel * f32_stride + c] = value;
      found += value != 0.0f;
    }
  }
  return found;
}

template <class Element>
int64_t prune_planes(const void* g_data, int64_t plane_stride, void* out_data, uint32_t n,
                     int64_t c_begin, int64_t c_end, int64_t first, int64_t pixels, int64_t width,
                     const PruneSpec& spec) {
  int64_t found = 0;
  for (int64_t c = c_begin; c < c_end; c += 4) {
    const int64_t planes = c_end - c < 4 ? c_end - c : 4;
    const int64_t offset = (c - c_begin) * plane_stride;
    const auto* g = static_cast<const typename Element::Storage*>(g_data) + offset;
    auto* out = static_cast<typename Element::Storage*>(out_data) + offset;
    for (int64_t pixel = first; pixel < first + pixels; ++pixel) {
      const PhiloxCounter words =
          prune_words(spec, n, static_cast<uint32_t>(c / 4), static_cast<uint32_t>(pixel / width),
                      static_cast<uint32_t>(pixel % width));
      for (int64_t j = 0; j < planes; ++j) {
        const float value =
            prune_element(Element::load(g[j * plane_stride + pixel]), spec.tau, words.word[j]);
        out[j * plane_stride + pixel] = Element::store(value);
        found += value != 0.0f;
      }
    }
  }
  return found;
}

double abs_sum_any(const void* g, DType dtype, int64_t count, int64_t* nonzeros) {
  return dtype == DType::kFloat32 ? abs_sum<Float32>(g, count, nonzeros)
                                  : abs_sum<BFloat16>(g, count, nonzeros);
}

int64_t load_pixels_any(const void* g, DType dtype, int64_t pixel_stride, void* out, float* out_f32,
                        int64_t f32_stride, int64_t pixels, int64_t channels) {
  auto* kernel = dtype == DType::kFloat32 ? &load_pixels<Float32> : &load_pixels<BFloat16>;
  return kernel(g, pixel_stride, out, out_f32, f32_stride, pixels, channels);
}

int64_t prune_pixels_any(const void* g, DType dtype, int64_t pixel_stride, void* out,
                         float* out_f32, int64_t f32_stride, uint32_t n, uint32_t h, uint32_t w,
                         int64_t pixels, int64_t channels, const PruneSpec& spec) {
  if (spec.tau == 0.0f)
    return load_pixels_any(g, dtype, pixel_stride, out, out_f32, f32_stride, pixels, channels);
  auto* kernel = dtype == DType::kFloat32 ? &prune_pixels<Float32> : &prune_pixels<BFloat16>;
  return kernel(g, pixel_stride, out, out_f32, f32_stride, n, h, w, pixels, channels, spec);
}

int64_t prune_planes_any(const void* g, DType dtype, int64_t plane_stride, void* out, uint32_t n,
                         int64_t c_begin, int64_t c_end, int64_t first, int64_t pixels,
                         int64_t width, const PruneSpec& spec) {
  auto* kernel = dtype == DType::kFloat32 ? &prune_planes<Float32> : &prune_planes<BFloat16>;
  return kernel(g, plane_stride, out, n, c_begin, c_end, first, pixels, width, spec);
}

}  // namespace

const PruneKernels prune_kernels_baseline = {abs_sum_any, prune_pixels_any, load_pixels_any,
                                             prune_planes_any};

}  // namespace sparsebwd
