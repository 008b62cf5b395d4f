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

// Elements of the gradient whose lists for WGC are held at a time.
constexpr int64_t kRoundElements = 1024 * 1024;

void run_serially(int64_t tasks, TaskBody body, void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

struct Workspace {
  Agb agb;
  Wgc wgc;
  ChannelLists channel_lists;
  std::vector<std::unique_ptr<PixelLists>> pixel_lists;  // one for each worker
  Buffer scratch;
};

class Backward {
 public:
  Backward(const ConvPlan& plan, const TaskPool& pool, Workspace& workspace)
      : plan_(plan), call_(plan.call), pool_(pool), workspace_(workspace) {}

  // AGB goes chunk by chunk, so that a chunk's lists are consumed out of L2 by the core that built
  // them. WGC sums over all pixels, so it waits for a round of chunks.
  int64_t run() {
    const int64_t images = plan_.problem.n;
    const int64_t chunk = plan_.chunk_images();
    const bool chunk_a_worker = ceil_div(images, chunk) >= pool_.threads;
    const int64_t step = chunk_a_worker ? chunk : chunk * pool_.threads;
    int64_t round = images;
    if (call_.grad_weight) {
      const int64_t wanted = kRoundElements / (plan_.p * plan_.q * plan_.problem.k);
      round = round_up(std::max({wanted, 2 * chunk * pool_.threads, step}), step);
    }
    prepare(std::min(step, round_up(images, plan_.wgc.images)), std::min(round, images),
            chunk_a_worker ? pool_.threads : 1);

    std::atomic<int64_t> nonzeros{0};
    for (int64_t begin = 0; begin < images; begin += round) {
      const Images here = {begin, std::min(begin + round, images)};
      workspace_.channel_lists.start(here);
      const auto chunk_images = [&](int64_t index) {
        const int64_t first = here.begin + index * step;
        return Images{first, std::min(first + step, here.end)};
      };
      const int64_t chunks = ceil_div(here.count(), step);
      if (chunk_a_worker) {
        const TaskPool serial = {1, run_serially};
        parallel_tasks(pool_, chunks, [&](int64_t index, int worker) {
          nonzeros += run_chunk(chunk_images(index), here, serial, worker);
        });
      } else {
        for (int64_t index = 0; index < chunks; ++index)
          nonzeros += run_chunk(chunk_images(index), here, pool_, 0);
      }
      if (call_.grad_weight)
        parallel_tasks(pool_, workspace_.wgc.tasks(workspace_.channel_lists),
                       [&](int64_t task, int worker) {
                         workspace_.wgc.run(workspace_.channel_lists, task, scratch(worker));
                       });
    }
    if (call_.grad_weight) workspace_.wgc.finish(pool_);
    return nonzeros;
  }

 private:
  void prepare(int64_t chunk_images, int64_t round_images, int chunk_workers) {
    int64_t floats = plan_.staged() ? plan_.tile_floats() : 0;
    if (call_.grad_input) {
      auto& lists = workspace_.pixel_lists;
      while (lists.size() < static_cast<size_t>(chunk_workers))
        lists.push_back(std::make_unique<PixelLists>());
      for (int i = 0; i < chunk_workers; ++i) lists[i]->reserve(plan_, chunk_images);
      workspace_.agb.start(plan_, pool_);
      floats = std::max(floats, workspace_.agb.scratch_floats());
    }
    if (call_.grad_weight) {
      const int64_t blocks = plan_.problem.groups * plan_.wgc.channel_blocks;
      const int64_t parts = std::min(plan_.k_group, ceil_div(2 * pool_.threads, blocks));
      workspace_.channel_lists.reserve(plan_, round_images, parts);
      workspace_.wgc.start(plan_);
      floats = std::max(floats, Wgc::scratch_floats());
    }
    // Kernels may load, not store, a little past the end; and workers share no cache line.
    scratch_stride_ = round_up(floats, 16) + 1024;
    scratch_ = workspace_.scratch.get<float>(scratch_stride_ * pool_.threads);
  }

  float* scratch(int worker) const { return scratch_ + worker * scratch_stride_; }

  // Lists and AGB of one chunk. Of the workers of `pool`, the first is number `worker`.
  int64_t run_chunk(Images images, Images round, const TaskPool& pool, int worker) {
    PixelLists* const pixel_lists =
        call_.grad_input ? workspace_.pixel_lists[worker].get() : nullptr;
    ChannelLists* const channel_lists = call_.grad_weight ? &workspace_.channel_lists : nullptr;
    if (pixel_lists) pixel_lists->start(images);
    const int64_t first_unit = plan_.units({round.begin, images.begin});
    std::atomic<int64_t> nonzeros{0};
    parallel_tasks(pool, plan_.units(images), [&](int64_t index, int inner) {
      nonzeros += list_unit(plan_, plan_.unit(images, index), first_unit + index, pixel_lists,
                            channel_lists, scratch(worker + inner));
    });
    if (pixel_lists) {
      parallel_tasks(pool, pixel_lists->groups() * plan_.p, [&](int64_t tile, int) {
        pixel_lists->sort(tile / plan_.p, tile % plan_.p);
      });
      parallel_tasks(pool, workspace_.agb.tasks(*pixel_lists), [&](int64_t task, int inner) {
        workspace_.agb.run(*pixel_lists, task, scratch(worker + inner));
      });
    }
    return nonzeros;
  }

  const ConvPlan& plan_;
  const ConvBackward& call_;
  const TaskPool& pool_;
  Workspace& workspace_;
  float* scratch_ = nullptr;
  int64_t scratch_stride_ = 0;
};

}  // namespace

int64_t conv_backward(const ConvKernels& kernels, const PruneKernels& prune_kernels,
                      const TaskPool& pool, const ConvBackward& call) {
  static thread_local Workspace workspace;
  const ConvPlan plan(kernels, prune_kernels, call);
  return Backward(plan, pool, workspace).run();
}

}  // namespace sparsebwd
