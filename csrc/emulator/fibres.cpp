// SPDX-License-Identifier: Apache-2.0
// Fibres, each the stack of a CUDA thread, and which of those that are ready runs next.
#include "fibres.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#ifdef SPARSEBWD_EMULATOR_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sparsebwd::cuda::emulator {

State state;
std::vector<std::unique_ptr<Fibre>> pool;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr long kMostPauses = 4'000'000;  // in a row, without a thread that gets past a barrier

jmp_buf host;  // where the launch goes on when no fibre is ready, or one has failed
long pauses;

}  // namespace

uint64_t random_number() {  // SplitMix64
  uint64_t z = (state.random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

size_t random_below(size_t bound) {
  return static_cast<size_t>(((random_number() >> 32) * bound) >> 32);
}

void activate(Fibre* fibre) {
  state.current = fibre;
  threadIdx = fibre->thread;
  blockIdx = fibre->block->index;
}

[[noreturn]] void to_host() {
  state.current = nullptr;
  _longjmp(host, 1);
}

namespace {

Fibre* take_ready() {
  std::vector<Fibre*>& ready = state.ready;
  Fibre*& drawn = ready[random_below(ready.size())];
  Fibre* fibre = drawn;
  drawn = ready.back();
  ready.pop_back();
  return fibre;
}

[[noreturn]] void resume(Fibre* fibre) {
  activate(fibre);
  if (fibre->started) _longjmp(fibre->context, 1);
  fibre->started = true;
  setcontext(&fibre->start);
  abort();
}

[[noreturn]] void resume_any() {
  if (state.ready.empty()) to_host();
  resume(take_ready());
}

// The current fibre waits until it is ready and drawn.
__attribute__((noinline)) void suspend() {
  Fibre* self = state.current;
  if (state.ready.empty()) {
    if (_setjmp(self->context) == 0) to_host();
    return;
  }
  Fibre* next = take_ready();
  if (next != self && _setjmp(self->context) == 0) resume(next);
}

}  // namespace

void wait_for(Wait wait, Site site) {
  state.current->wait = wait;
  state.current->site = site;
  suspend();
}

void note_progress() { pauses = 0; }

void make_ready(Fibre* fibre) {
  note_progress();
  fibre->wait = Wait::kNothing;
  state.ready.push_back(fibre);
}

void make_ready(std::vector<Fibre*>& fibres) {
  if (kChecked) join(fibres);
  for (Fibre* fibre : fibres) make_ready(fibre);
  fibres.clear();
}

namespace {

void fibre_main() {
  for (;;) {
    state.launch.call(state.launch.arguments);
    end_of_thread();
  }
}

}  // namespace

void reset(Fibre& fibre) {
#ifdef SPARSEBWD_EMULATOR_SANITIZED
  __asan_unpoison_memory_region(fibre.stack, static_cast<size_t>(fibre.stack_end - fibre.stack));
#endif
  fibre.started = false;
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack;
  fibre.start.uc_stack.ss_size = static_cast<size_t>(fibre.stack_end - fibre.stack);
  fibre.start.uc_link = nullptr;
  makecontext(&fibre.start, fibre_main, 0);
}

void run_until_none_is_ready() {
  pauses = 0;
  if (_setjmp(host) == 0) resume_any();
  state.current = nullptr;
}

void grow_pool(size_t fibres) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (pool.size() < fibres) {
    auto fibre = std::make_unique<Fibre>();
    // Stacks begin at different places of a page, else they would evict each other from caches.
    const size_t shift = pool.size() % 61 * 192, bytes = kStackBytes + 3 * page;
    void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0)
      throw std::runtime_error("emulator: no memory for the stack of a thread");
    fibre->stack = static_cast<unsigned char*>(memory) + page;
    fibre->stack_end = fibre->stack + bytes - shift;
    reset(*fibre);
    pool.push_back(std::move(fibre));
  }
}

void join(const std::vector<Fibre*>& threads) {
  auto merged = std::make_shared<Clocks>(*threads[0]->known);
  // Neighbours mostly know the same.
  const Clocks* last = threads[0]->known.get();
  for (const Fibre* fibre : threads) {
    if (fibre->known.get() == last) continue;
    last = fibre->known.get();
    for (size_t i = 0; i < merged->size(); ++i) (*merged)[i] = std::max((*merged)[i], (*last)[i]);
  }
  for (Fibre* fibre : threads) (*merged)[fibre->number] = fibre->clock++;
  for (Fibre* fibre : threads) fibre->known = merged;
}

void pause() {
  if (++pauses > kMostPauses) fail("no thread gets any further: what they poll does not change");
  state.ready.push_back(state.current);
  suspend();
}

void fence() { state.fenced = true; }

}  // namespace sparsebwd::cuda::emulator
