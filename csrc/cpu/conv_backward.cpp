// SPDX-License-Identifier: Apache-2.0
#include "conv_backward.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "agb.h"
#include "buffer.h"
#include "conv_plan.h"
#include "lists.h"
#include "wgc.h"

namespace sparsebwd {
namespace {

// Largest partial sums of grad_weight that are kept several times, for as many groups of images.
constexpr int64_t kPrivateSumFloats = 256 * 1024;
constexpr int64_t kMostGroups = 8;
// A workspace that has grown larger is not kept for the next call.
constexpr int64_t kKeptBytes = 256 * 1024 * 1024;

void run_serially(int, int64_t tasks, TaskBody body, void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

// What one worker needs, or all workers together.
struct Lists {
  PixelLists pixel;
  ChannelLists channel;
};

struct Workspace {
  Agb agb;
  Wgc wgc;
  std::vector<std::unique_ptr<Lists>> lists;
  Buffer<float> scratch;
};

class Backward {
 public:
  Backward(const ConvPlan& plan, const TaskPool& pool, Workspace& workspace)
      : plan_(plan),
        call_(plan.call),
        pool_(pool),
        workspace_(workspace),
        chunk_(plan.chunk_images()) {}

  // Lists are consumed out of L2, chunk of images by chunk. Where the sums of grad_weight are small,
  // groups of images have sums of their own: each worker takes a group, and nobody waits. With more
  // workers than groups, all of them share the lists of a chunk and split the channels. The groups
  // depend on the problem only, so that results do not depend on the number of threads.
  int64_t run() {
    const int64_t images = plan_.problem.n;
    const int64_t chunks = ceil_div(images, chunk_);
    int64_t groups = std::max<int64_t>(1, std::min(chunks, kMostGroups));
    if (listing_channels() && Wgc::sum_floats(plan_) > kPrivateSumFloats) groups = 1;
    const bool independent = groups >= pool_.threads;
    prepare(groups, independent);

    const TaskPool serial = {1, run_serially};
    const TaskPool& inner = independent ? serial : pool_;
    const int64_t group_images = ceil_div(chunks, groups) * chunk_;
    const int64_t step = chunk_ * inner.threads;
    std::atomic<int64_t> nonzeros{0};
    auto run_group = [&](int64_t group, int worker) {
      const int64_t end = std::min((group + 1) * group_images, images);
      for (int64_t begin = group * group_images; begin < end; begin += step)
        nonzeros += run_chunk({begin, std::min(begin + step, end)}, group, inner, worker);
    };
    if (independent) parallel_tasks(pool_, groups, run_group);
    else
      for (int64_t group = 0; group < groups; ++group) run_group(group, 0);
    if (call_.grad_weight) workspace_.wgc.finish(pool_);
    return nonzeros;
  }

 private:
  bool listing_pixels() const { return call_.grad_input || call_.lists_only; }
  bool listing_channels() const { return call_.grad_weight || call_.lists_only; }

  void prepare(int64_t groups, bool independent) {
    const int64_t workers = independent ? pool_.threads : 1;
    const int64_t most = independent ? chunk_ : chunk_ * pool_.threads;
    const int64_t images = std::min(most, round_up(plan_.problem.n, plan_.wgc.images));
    // Without images no task would write the zeros of grad_weight.
    const bool at_once = groups == 1 && plan_.problem.n > 0 && plan_.problem.n <= most;
    auto& lists = workspace_.lists;
    while (static_cast<int64_t>(lists.size()) < workers) lists.push_back(std::make_unique<Lists>());
    int64_t floats = plan_.staged() ? plan_.tile_floats() : 0;
    if (listing_pixels())
      for (int64_t i = 0; i < workers; ++i) lists[i]->pixel.reserve(plan_, images);
    if (call_.grad_input) {
      workspace_.agb.start(plan_, pool_, at_once);
      floats = std::max(floats, workspace_.agb.scratch_floats());
    }
    if (listing_channels()) {
      const int64_t blocks = plan_.problem.groups * plan_.wgc.channel_blocks;
      const int64_t parts =
          independent ? 1 : std::min(plan_.k_group, ceil_div(2 * pool_.threads, blocks));
      for (int64_t i = 0; i < workers; ++i) lists[i]->channel.reserve(plan_, images, parts);
    }
    if (call_.grad_weight) {
      workspace_.wgc.start(plan_, groups, at_once);
      floats = std::max(floats, workspace_.wgc.scratch_floats());
    }
    // Kernels may load a little past the end; and workers share no cache line.
    scratch_stride_ = round_up(floats, 16) + 1024;
    workspace_.scratch.reserve(scratch_stride_ * pool_.threads);
  }

  float* scratch(int worker) const { return workspace_.scratch.data() + worker * scratch_stride_; }

  // Of the workers of `pool`, the first is number `worker`.
  int64_t run_chunk(Images images, int64_t group, const TaskPool& pool, int worker) {
    Lists& lists = *workspace_.lists[worker];
    PixelLists* const pixel = listing_pixels() ? &lists.pixel : nullptr;
    ChannelLists* const channel = listing_channels() ? &lists.channel : nullptr;
    if (pixel) pixel->start(images);
    if (channel) channel->start(images);
    std::atomic<int64_t> nonzeros{0};
    parallel_tasks(pool, plan_.units(images), [&](int64_t index, int inner) {
      nonzeros += list_unit(plan_, plan_.unit(images, index), index, pixel, channel,
                            scratch(worker + inner));
    });
    if (pixel)
      parallel_tasks(pool, pixel->groups() * plan_.p,
                     [&](int64_t tile, int) { pixel->sort(tile / plan_.p, tile % plan_.p); });
    if (call_.grad_input)
      parallel_tasks(pool, workspace_.agb.tasks(*pixel), [&](int64_t task, int inner) {
        workspace_.agb.run(*pixel, task, scratch(worker + inner));
      });
    if (call_.grad_weight)
      parallel_tasks(pool, workspace_.wgc.tasks(*channel), [&](int64_t task, int inner) {
        workspace_.wgc.run(*channel, group, task, scratch(worker + inner));
      });
    return nonzeros;
  }

  const ConvPlan& plan_;
  const ConvBackward& call_;
  const TaskPool& pool_;
  Workspace& workspace_;
  const int64_t chunk_;  // images
  int64_t scratch_stride_ = 0;
};

}  // namespace

int64_t conv_backward(const ConvKernels& kernels, const PruneKernels& prune_kernels,
                      const TaskPool& pool, const ConvBackward& call) {
  static thread_local std::unique_ptr<Workspace> workspace;
  if (!workspace) workspace = std::make_unique<Workspace>();
  const ConvPlan plan(kernels, prune_kernels, call);
  const int64_t nonzeros = Backward(plan, pool, *workspace).run();
  if (held_bytes() > kKeptBytes) workspace.reset();
  return nonzeros;
}

}  // namespace sparsebwd
