// SPDX-License-Identifier: Apache-2.0
// Launches: blocks, their shared memory, and the order in which they run.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "fibres.h"

namespace sparsebwd::cuda::emulator {

namespace {

constexpr size_t kGuard = 64;  // bytes around shared memory, that must stay as they are
constexpr unsigned char kGuardByte = 0xA5;
constexpr unsigned kMostThreads = 1024;  // of a block

std::mutex mutex;  // one launch at a time
uint64_t next_seed = 0;
Limits limits = {4, 227 * 1024, 228 * 1024, 1};

void check_guards(const Block& block) {
  const unsigned char* begin = block.shared;
  const unsigned char* end = block.shared + state.launch.shared;
  for (size_t i = 1; i <= kGuard; ++i)
    for (const unsigned char* guard : {begin - i, end + i - 1})
      if (*guard != kGuardByte && state.error.empty())
        state.error = "kernel " + symbol(state.launch.kernel) + ", block " +
                      coordinates(block.index) + ": wrote outside its " +
                      std::to_string(state.launch.shared) + " bytes of shared memory, at offset " +
                      std::to_string(guard - begin);
}

// Gives the block its threads, from the pool's fibre `first` on, and its memory.
void set_up(Block& block, uint64_t index, size_t first) {
  const Launch& launch = state.launch;
  block.index = {static_cast<unsigned>(index % launch.grid.x),
                 static_cast<unsigned>(index / launch.grid.x % launch.grid.y),
                 static_cast<unsigned>(index / launch.grid.x / launch.grid.y)};
  const unsigned threads = state.block_threads;
  block.first_thread = state.first_thread + static_cast<uint32_t>(index) * threads;
  block.alive = threads;
  block.waiting.clear();
  block.votes = {0, 0, 1};
  for (GroupBarrier& group : block.groups) group = {};

  if (!block.memory)
    block.memory = std::make_unique<unsigned char[]>(launch.shared + 2 * kGuard + 256);
  // Aligned to 16 bytes and no more, as is promised.
  const auto address = reinterpret_cast<uintptr_t>(block.memory.get()) + kGuard;
  block.shared = block.memory.get() + kGuard + (128 - address % 128) + 16;
  memset(block.shared - kGuard, kGuardByte, kGuard);
  memset(block.shared, kPoison, launch.shared);
  memset(block.shared + launch.shared, kGuardByte, kGuard);
  if (kChecked) block.shadow.bytes.assign(launch.shared, {});

  block.threads.resize(threads);
  block.warps.assign((threads + 31) / 32, {});
  const auto nothing_known = kChecked ? std::make_shared<const Clocks>(threads, 0) : nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = *pool[first + i];
    fibre.block = &block;
    fibre.warp = &block.warps[i / 32];
    fibre.thread = {i % launch.block.x, i / launch.block.x % launch.block.y,
                    i / launch.block.x / launch.block.y};
    fibre.number = i;
    fibre.lane = i % 32;
    fibre.wait = Wait::kNothing;
    fibre.copies.clear();
    fibre.committed.clear();
    fibre.clock = 1;
    fibre.grid_clock = 0;
    fibre.known = nothing_known;
    fibre.warp->alive |= 1u << fibre.lane;
    fibre.warp->lanes[fibre.lane] = &fibre;
    block.threads[i] = &fibre;
    state.ready.push_back(&fibre);
  }
}

// Runs what is ready until all blocks have ended.
void run_ready() {
  run_until_none_is_ready();
  if (!state.error.empty()) return;
  for (const auto& block : state.blocks)
    if (block->alive > 0) {
      state.error = deadlock();
      return;
    }
  for (const auto& block : state.blocks) check_guards(*block);
}

}  // namespace

Limits& device() { return limits; }

void set_seed(uint64_t seed) { next_seed = seed; }

unsigned char* shared_memory() { return state.current->block->shared; }

unsigned lane_number() { return state.current->lane; }

cudaError_t resident_blocks(int threads, size_t shared, int* blocks) {
  if (threads < 1 || threads > static_cast<int>(kMostThreads)) return cudaErrorInvalidValue;
  if (shared > static_cast<size_t>(limits.shared_per_block)) return cudaErrorInvalidValue;
  const int by_threads = 2048 / ((threads + 31) / 32 * 32);
  const auto by_memory =
      static_cast<int>(static_cast<size_t>(limits.shared_per_multiprocessor) / (shared + 1024));
  *blocks = std::min({by_threads, by_memory, 32});
  return cudaSuccess;
}

cudaError_t run(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z,
                 threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0) return cudaSuccess;
  if (threads == 0 || threads > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (launch.shared > static_cast<size_t>(limits.shared_per_block)) return cudaErrorInvalidValue;
  if (launch.cooperative && !limits.cooperative) return cudaErrorNotSupported;
  if (launch.cooperative) {
    int resident = 0;
    const cudaError_t error = resident_blocks(static_cast<int>(threads), launch.shared, &resident);
    if (error != cudaSuccess) return error;
    if (blocks > static_cast<uint64_t>(resident) * static_cast<uint64_t>(limits.multiprocessors))
      return cudaErrorCooperativeLaunchTooLarge;
  }

  const std::lock_guard<std::mutex> lock(mutex);
  const size_t together = launch.cooperative ? blocks : 1;
  grow_pool(together * threads);
  state.launch = launch;
  state.block_threads = static_cast<unsigned>(threads);
  state.fenced = false;
  state.error.clear();
  state.random = next_seed++ * 0xD1342543DE82EF95u + 1;
  blockDim = block;
  gridDim = grid;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  state.blocks.clear();
  for (size_t i = 0; i < together; ++i) state.blocks.push_back(std::make_unique<Block>());

  for (size_t i = 0; i < blocks && state.error.empty(); i += together) {
    for (size_t j = 0; j < together; ++j)
      set_up(*state.blocks[j], launch.cooperative ? j : order[i], j * threads);
    run_ready();
  }
  state.first_thread += static_cast<uint32_t>(blocks * threads);
  if (!state.error.empty()) {
    // Fibres were left in the middle of a kernel: they begin again.
    for (const auto& block : state.blocks)
      for (Fibre* fibre : block->threads) reset(*fibre);
    state.ready.clear();
    state.at_grid_barrier.clear();
    throw std::runtime_error(state.error);
  }
  return cudaSuccess;
}

}  // namespace sparsebwd::cuda::emulator
