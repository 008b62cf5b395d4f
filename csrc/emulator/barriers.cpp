// SPDX-License-Identifier: Apache-2.0
// Barriers of blocks, groups of warps and grids, and what the end of a thread means to those that wait.
#include "fibres.h"

namespace sparsebwd::cuda::emulator {

namespace {

void pass_block_barrier(Block& block) {
  block.result = block.votes;
  block.votes = {0, 0, 1};
  if (kChecked) {
    // What threads did before they returned is known as well.
    join(block.threads);
    for (Fibre* fibre : block.waiting) make_ready(fibre);
    block.waiting.clear();
  } else {
    make_ready(block.waiting);
  }
}

}  // namespace

void end_of_thread() {
  Fibre* self = state.current;
  Block& block = *self->block;
  Warp& warp = *self->warp;
  warp.alive &= ~(1u << self->lane);
  for (int i = 0; i < warp.open; ++i)
    if (warp.meetings[i].mask >> self->lane & 1)
      fail("returns, while others wait for it in %s with mask %s", name_of(warp.meetings[i].call),
           hex(warp.meetings[i].mask).c_str());
  --block.alive;
  note_progress();
  if (block.alive > 0 && block.alive == block.waiting.size()) pass_block_barrier(block);
  wait_for(Wait::kEnd, {});
}

Votes block_barrier(bool predicate, Site site) {
  Fibre* self = state.current;
  Block& block = *self->block;
  if (!block.waiting.empty()) {
    const Fibre& first = *block.waiting[0];
    if (first.site.line != site.line || strcmp(first.site.file, site.file) != 0)
      fail("is at the __syncthreads at %s, while thread %s of its block waits in that at %s",
           where(site).c_str(), coordinates(first.thread).c_str(), where(first.site).c_str());
  }
  block.votes.count += predicate;
  block.votes.any |= predicate;
  block.votes.all &= predicate;
  block.waiting.push_back(self);
  if (block.waiting.size() == block.alive) pass_block_barrier(block);
  wait_for(Wait::kBlockBarrier, site);
  return block.result;
}

void group_barrier(int id, int threads, Site site) {
  Fibre* self = state.current;
  if (id < 1 || id > 15)
    fail("named_barrier %d at %s: there are barriers 1 to 15", id, where(site).c_str());
  if (threads < 32 || threads % 32 != 0 || threads > static_cast<int>(self->block->threads.size()))
    fail("named_barrier %d at %s for %d threads: that is not a number of whole warps of its block",
         id, where(site).c_str(), threads);
  GroupBarrier& group = self->block->groups[id];
  if (group.waiting.empty()) group.threads = threads;
  if (group.threads != threads)
    fail("named_barrier %d at %s is for %d threads here, for %d where thread %s waits", id,
         where(site).c_str(), threads, group.threads,
         coordinates(group.waiting[0]->thread).c_str());
  self->barrier = id;
  group.waiting.push_back(self);
  if (static_cast<int>(group.waiting.size()) == threads) {
    uint32_t warps = 0;
    for (const Fibre* fibre : group.waiting) warps |= 1u << fibre->number / 32;
    if (__builtin_popcount(warps) * 32 != threads)
      fail("named_barrier %d at %s: some warp is not there as a whole", id, where(site).c_str());
    make_ready(group.waiting);
  }
  wait_for(Wait::kGroupBarrier, site);
}

void grid_barrier(Site site) {
  Fibre* self = state.current;
  if (!state.launch.cooperative)
    fail("grid_sync at %s in a launch that is not cooperative", where(site).c_str());
  state.at_grid_barrier.push_back(self);
  if (state.at_grid_barrier.size() == state.blocks.size() * state.block_threads) {
    if (kChecked)
      for (const auto& block : state.blocks) {
        for (Fibre* fibre : block->threads) fibre->grid_clock = fibre->clock;
        join(block->threads);
      }
    for (Fibre* fibre : state.at_grid_barrier) make_ready(fibre);
    state.at_grid_barrier.clear();
  }
  wait_for(Wait::kGridBarrier, site);
}

}  // namespace sparsebwd::cuda::emulator
