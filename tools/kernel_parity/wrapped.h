// SPDX-License-Identifier: Apache-2.0
// Kernels that count their calls, and are wrong on demand.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "conv_kernels.h"
#include "depthwise_kernels.h"
#include "isa.h"
#include "prune_kernels.h"

namespace parity {

using namespace sparsebwd;

inline std::string fault;  // the name of the kernel whose results are made wrong

constexpr int kMost = 16;
inline const IsaKernels* tested;
inline std::map<std::string, int64_t> calls;

inline void count_call(const char* family, int index) {
  ++calls[std::string(tested->name) + " " + family + " " + std::to_string(index)];
}

template <int I>
void counted_agb(List list, const Visit* visits, int64_t count, const float* panel, float* dst) {
  count_call("agb", I);
  tested->conv.agb[I].run(list, visits, fault == "agb" ? count - 1 : count, panel, dst);
}

template <int I>
void counted_wgc(List lists, int64_t capacity, const uint16_t* counts, const uint16_t* order,
                 int64_t begin, int64_t end, const float* panel, int64_t row_bytes, float* dw,
                 int64_t dw_stride, Upcoming upcoming) {
  count_call("wgc", I);
  tested->conv.wgc[I].run(lists, capacity, counts, order, fault == "wgc" ? begin + 1 : begin, end,
                          panel, row_bytes, dw, dw_stride, upcoming);
}

template <int Kind, int I>
void counted_depthwise(const DepthwiseRun& run) {
  const DepthwiseKernel* const kernels[] = {tested->depthwise.both, tested->depthwise.agb,
                                            tested->depthwise.wgc};
  count_call("depthwise", 3 * I + Kind);
  DepthwiseRun changed = run;
  if (fault == "depthwise") --changed.columns;
  kernels[Kind][I](changed);
}

inline int64_t wrong_pixels(const void* g, DType dtype, int64_t pixel_stride, void* out,
                            float* out_f32, int64_t f32_stride, uint32_t n, uint32_t h, uint32_t w,
                            int64_t pixels, int64_t channels, const PruneSpec& spec) {
  return tested->prune.prune_pixels_nhwc(g, dtype, pixel_stride, out, out_f32, f32_stride, n, h,
                                         w + 1, pixels, channels, spec);
}

inline double wrong_sum(const void* g, DType dtype, int64_t count, int64_t* nonzeros) {
  return tested->prune.abs_sum(g, dtype, count - count % 2, nonzeros);
}

struct Wrapped {
  AgbKernel agb[kMost];
  WgcKernel wgc[kMost];
  ConvKernels conv;
  DepthwiseKernels depthwise;
  PruneKernels prune;
};

template <int... I>
Wrapped wrap(const IsaKernels& isa, std::integer_sequence<int, I...>) {
  tested = &isa;
  Wrapped w = {{}, {}, isa.conv, isa.depthwise, isa.prune};
  const AgbRun agb_runs[] = {counted_agb<I>...};
  const WgcRun wgc_runs[] = {counted_wgc<I>...};
  for (int i = 0; i < isa.conv.agb_count; ++i)
    w.agb[i] = {isa.conv.agb[i].columns, isa.conv.agb[i].group, agb_runs[i]};
  for (int i = 0; i < isa.conv.wgc_count; ++i) {
    w.wgc[i] = isa.conv.wgc[i];
    w.wgc[i].run = wgc_runs[i];
  }
  const DepthwiseKernel by_taps[][kMost] = {{counted_depthwise<0, I % kMostTaps>...},
                                            {counted_depthwise<1, I % kMostTaps>...},
                                            {counted_depthwise<2, I % kMostTaps>...}};
  std::copy_n(by_taps[0], kMostTaps, w.depthwise.both);
  std::copy_n(by_taps[1], kMostTaps, w.depthwise.agb);
  std::copy_n(by_taps[2], kMostTaps, w.depthwise.wgc);
  if (fault == "prune") w.prune.prune_pixels_nhwc = wrong_pixels;
  if (fault == "abs_sum") w.prune.abs_sum = wrong_sum;
  return w;
}

// The kernels of one instruction set for conv_backward() and others; what is wrapped stays where it is.
inline const ConvKernels& wrapped_conv(Wrapped& w) {
  w.conv.agb = w.agb;
  w.conv.wgc = w.wgc;
  return w.conv;
}

}  // namespace parity
