// SPDX-License-Identifier: Apache-2.0
// The state of a launch, shared by the runtime (fibres.h) and the memory checks (checks.cpp).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#define SPARSEBWD_EMULATOR_RUNTIME
#include "emulator.h"

// To kernels they are constants.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace sparsebwd::cuda::emulator {

#ifdef SPARSEBWD_EMULATOR_CHECKED
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

struct Block;
struct Warp;

struct Copy {
  unsigned char* shared;
  const void* global;
  int bytes;
  bool read_at_issue;  // else when it is waited for
  unsigned char data[16];
};

// How often each thread of a block had synchronised when others last heard of it.
using Clocks = std::vector<uint32_t>;

// What a thread is waiting for.
enum class Wait { kNothing, kBlockBarrier, kGroupBarrier, kGridBarrier, kWarp, kEnd };

// A stack and where it was left; runs one CUDA thread after another.
struct Fibre {
  jmp_buf context;
  ucontext_t start;
  bool started = false;
  unsigned char *stack = nullptr, *stack_end = nullptr;

  Block* block;
  Warp* warp;
  uint3 thread;
  unsigned number, lane;  // in the block, in the warp

  Wait wait;
  Site site;
  int barrier;    // of kGroupBarrier
  uint32_t mask;  // of kWarp
  WarpCall call;
  Lane exchange;

  std::vector<Copy> copies;       // that were issued and not waited for
  std::vector<size_t> committed;  // how many copies each group adds

  uint32_t clock;       // counts what orders this thread and others
  uint32_t grid_clock;  // when it last passed the barrier of the grid
  std::shared_ptr<const Clocks> known;
};

struct Warp {
  struct Meeting {
    uint32_t mask, arrived;
    WarpCall call;
  };
  Meeting meetings[32];
  int open;  // meetings
  uint32_t alive;
  Fibre* lanes[32];
};

struct GroupBarrier {
  int threads = 0;
  std::vector<Fibre*> waiting;
};

// The last accesses to a byte.
struct Access {
  uint32_t thread;  // of all threads of all launches; those of earlier launches do not count
  uint32_t clock;
  uint32_t place;  // in the code, from the start of the module
};
struct Shadow {
  enum State : uint8_t { kEmpty, kWritten, kOnTheWay };
  struct Byte {
    Access write;
    Access reads[2];  // the last, and the last of another warp
    State state;
    bool atomic;  // the write
  };
  std::vector<Byte> bytes;
};

struct Block {
  uint3 index;
  uint32_t first_thread;  // as Access counts
  std::vector<Fibre*> threads;
  std::vector<Warp> warps;
  unsigned alive;

  // of __syncthreads
  std::vector<Fibre*> waiting;
  Votes votes, result;
  GroupBarrier groups[16];

  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared;
  Shadow shadow;
};

struct State {
  Launch launch;
  unsigned block_threads;
  Fibre* current = nullptr;  // null while the host's code runs
  std::vector<Fibre*> ready;
  std::vector<std::unique_ptr<Block>> blocks;  // alive at once
  std::vector<Fibre*> at_grid_barrier;
  uint32_t first_thread = 1;  // of the launch, as Access counts
  bool fenced;                // a thread has called __threadfence: blocks may pass data by flags
  std::string error;
  uint64_t random;
};
extern State state;

// The threads know what each other did before.
void join(const std::vector<Fibre*>& threads);

// Checks of memory that the runtime reads or writes for a thread. Nothing in the fast build.
enum class Use { kRead, kWrite, kAtomic, kIssueCopy, kFinishCopy };
void check_access(const void* address, size_t bytes, Use use, const void* code);

std::string coordinates(const uint3& index);

// The function at an address of this module, demangled, or its address.
std::string symbol(const void* address);

}  // namespace sparsebwd::cuda::emulator
