// SPDX-License-Identifier: Apache-2.0
// How fast the inner loops of the sparse convolutions run when everything else is for free: operands
// in L1, lists built, visited in order. `make ceilings` compiles and runs it; docs/performance.md
// says what follows from the numbers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#elif defined(__aarch64__)
#include "vec_neon.h"
#else
#include "vec_baseline.h"
#endif
#include "conv_kernels.inl"

using namespace sparsebwd;

namespace {

constexpr int64_t kOperands = 64;  // places in the panel that lists point to
constexpr int64_t kLists = 1 << 15;  // more than a branch predictor learns by heart
constexpr int64_t kSumPlaces = 64;

// The median of nine samples over the best of them, at the most so far: what others took away.
double disturbance = 1.0;

// The best of nine.
template <class Run>
double seconds(Run run) {
  std::vector<double> samples;
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    samples.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(samples.begin(), samples.end());
  disturbance = std::max(disturbance, samples[samples.size() / 2] / samples.front());
  return samples.front();
}

constexpr int kChains = 12, kSteps = 1 << 20;

volatile float starts[kChains];  // the compiler cannot know them to be alike

float chains() {
  const float one = 1.0f;
  const Vec g = Vec::broadcast(&one);
  Vec sums[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) {
    const float start = starts[i];
    sums[i] = Vec::broadcast(&start);
  }
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i].fma(g, g);
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sums[0] = sums[0] + sums[i];
  float result[kLanes];
  sums[0].store(result);
  return result[0];
}

// Independent chains of multiply-adds on registers: the arithmetic peak.
double registers() {
  volatile float used;
  return 2.0 * kChains * kLanes * kSteps / seconds([&] { used = chains(); });
}

struct Lists {
  std::vector<float> values;
  std::vector<uint16_t> offsets;
  std::vector<Visit> visits;
};

// `length` entries each, or as many on average if `random`.
Lists make_lists(double length, bool random, int64_t step, int64_t dst_bytes) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<double> uniform(0, kOperands);
  Lists lists;
  for (int64_t i = 0; i < kLists; ++i) {
    const uint32_t start = static_cast<uint32_t>(lists.values.size());
    for (int64_t k = 0; k < (random ? kOperands : static_cast<int64_t>(length)); ++k) {
      if (random && uniform(generator) >= length) continue;
      lists.values.push_back(1.0f);
      lists.offsets.push_back(static_cast<uint16_t>((random ? k : generator() % kOperands) * step));
    }
    lists.visits.push_back({start, static_cast<uint32_t>(lists.values.size()) - start,
                            static_cast<uint32_t>(i % kSumPlaces * dst_bytes)});
  }
  lists.values.resize(lists.values.size() + 64);
  lists.offsets.resize(lists.offsets.size() + 64);
  return lists;
}

void report(const char* name, AgbRun run, int vectors, double peak) {
  const int64_t bytes = vectors * kLanes * 4;
  auto* panel = static_cast<float*>(aligned_alloc(4096, 128 * 1024));
  auto* sums = static_cast<float*>(aligned_alloc(4096, 128 * 1024));
  memset(panel, 0, 128 * 1024);
  memset(sums, 0, 128 * 1024);
  printf("%-26s", name);
  for (const double length : {64.0, 32.0, 22.4, 12.8, 6.4, 3.2}) {
    Lists lists = make_lists(length, length < 64, bytes, bytes);
    const List list = {lists.values.data(), lists.offsets.data()};
    // As many lists at a time as stay in L1.
    const int64_t some = 16;
    const double time = seconds([&] {
      for (int64_t i = 0; i < kLists; i += some)
        for (int repeat = 0; repeat < 2; ++repeat)
          run(list, lists.visits.data() + i, some, panel, sums);
    });
    const double entries = static_cast<double>(lists.values.size() - 64);
    const double rate = 2 * 2.0 * entries * vectors * kLanes / time;
    printf(" %4.0f %2.0f%%", rate / 1e9, 100 * rate / peak);
    fflush(stdout);
  }
  printf("\n");
  free(panel);
  free(sums);
}

}  // namespace

int main() {
  double load = 0;
  if (getloadavg(&load, 1) == 1 && load > 0.5)
    fprintf(stderr, "warning: this machine is busy (load %.1f); what is measured may be too low\n",
            load);
  const double peak = registers();
  printf("%d lanes, GFLOP/s of one thread (share of the first number)\n", kLanes);
  printf("multiply-adds on registers %4.0f\n", peak / 1e9);
  printf("entries a list, on average%9s%9s%9s%9s%9s%9s\n", "fixed 64", "32", "22.4", "12.8", "6.4",
         "3.2");
  report("AGB, 3 columns x 2 vectors", agb_run<3, 2>, 6, peak);
  report("AGB, 1 column x 8 vectors", agb_run<1, 8>, 8, peak);
  report("AGB, 1 column x 4 vectors", agb_run<1, 4>, 4, peak);
  if (disturbance > 1.2)
    fprintf(stderr,
            "warning: samples took up to %.1f times as long as the best of nine: repeat this on an "
            "idle machine\n",
            disturbance);
}
