// SPDX-License-Identifier: Apache-2.0
// Fibres and who runs next; barriers, warp intrinsics, atomics, asynchronous copies; launches.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>

#ifdef SPARSEBWD_EMULATOR_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

#include "sparsebwd/dtype.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sparsebwd::cuda::emulator {

State state;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuard = 64;  // bytes around shared memory, that must stay as they are
constexpr unsigned char kGuardByte = 0xA5, kPoison = 0xFF;  // the latter makes NaNs of all types
constexpr unsigned kMostThreads = 1024;                     // of a block
constexpr long kMostPauses = 4'000'000;  // in a row, without a thread that gets past a barrier

std::mutex mutex;  // one launch at a time
std::vector<std::unique_ptr<Fibre>> pool;
jmp_buf host;  // where the launch goes on when no fibre is ready, or one has failed
uint64_t next_seed = 0;
Limits limits = {4, 227 * 1024, 228 * 1024};
long pauses;

uint64_t random_number() {  // SplitMix64
  uint64_t z = (state.random += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

size_t random_below(size_t bound) {
  return static_cast<size_t>(((random_number() >> 32) * bound) >> 32);
}

// ---- fibres

void activate(Fibre* fibre) {
  state.current = fibre;
  threadIdx = fibre->thread;
  blockIdx = fibre->block->index;
}

Fibre* take_ready() {
  std::vector<Fibre*>& ready = state.ready;
  Fibre*& drawn = ready[random_below(ready.size())];
  Fibre* fibre = drawn;
  drawn = ready.back();
  ready.pop_back();
  return fibre;
}

[[noreturn]] void to_host() {
  state.current = nullptr;
  _longjmp(host, 1);
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

void wait_for(Wait wait, Site site) {
  state.current->wait = wait;
  state.current->site = site;
  suspend();
}

void make_ready(Fibre* fibre) {
  pauses = 0;
  fibre->wait = Wait::kNothing;
  state.ready.push_back(fibre);
}

void make_ready(std::vector<Fibre*>& fibres) {
  if (kChecked) join(fibres);
  for (Fibre* fibre : fibres) make_ready(fibre);
  fibres.clear();
}

void end_of_thread();

void fibre_main() {
  for (;;) {
    state.launch.call(state.launch.arguments);
    end_of_thread();
  }
}

// Whatever was left in the middle on that stack is forgotten.
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

// ---- what went wrong

std::string where(Site site) {
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

const char* name_of(WarpCall call) {
  switch (call) {
    case WarpCall::kSync: return "__syncwarp";
    case WarpCall::kShuffle: return "__shfl_sync";
    case WarpCall::kShuffleUp: return "__shfl_up_sync";
    case WarpCall::kShuffleDown: return "__shfl_down_sync";
    case WarpCall::kShuffleXor: return "__shfl_xor_sync";
    case WarpCall::kBallot: return "__ballot_sync, __any_sync or __all_sync";
    case WarpCall::kMatchAny: return "__match_any_sync";
    case WarpCall::kMatchAll: return "__match_all_sync";
    case WarpCall::kAddUnsigned: return "__reduce_add_sync";
    case WarpCall::kMinUnsigned:
    case WarpCall::kMinSigned: return "__reduce_min_sync";
    case WarpCall::kMaxUnsigned:
    case WarpCall::kMaxSigned: return "__reduce_max_sync";
    case WarpCall::kAnd: return "__reduce_and_sync";
    case WarpCall::kOr: return "__reduce_or_sync";
    case WarpCall::kXor: return "__reduce_xor_sync";
    case WarpCall::kMmaTf32: return "mma_m16n8k8_tf32";
    case WarpCall::kMmaBFloat16: return "mma_m16n8k16_bf16";
    case WarpCall::kMmaFloat16: return "mma_m16n8k16_f16";
  }
  return "?";
}

std::string hex(uint32_t mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string waits_in(const Fibre& fibre) {
  std::string what;
  switch (fibre.wait) {
    case Wait::kNothing: return "runs";
    case Wait::kEnd: return "has returned";
    case Wait::kBlockBarrier: what = "__syncthreads"; break;
    case Wait::kGroupBarrier: what = "named_barrier " + std::to_string(fibre.barrier); break;
    case Wait::kGridBarrier: what = "grid_sync"; break;
    case Wait::kWarp:
      what = std::string(name_of(fibre.call)) + " with mask " + hex(fibre.mask);
      break;
  }
  return "waits in " + what + " at " + where(fibre.site);
}

std::string name_of(const Fibre& fibre) {
  return "thread " + coordinates(fibre.thread) + " of block " + coordinates(fibre.block->index);
}

std::string deadlock() {
  std::map<std::string, std::pair<int, const Fibre*>> kinds;
  for (const auto& block : state.blocks)
    for (const Fibre* fibre : block->threads) {
      auto& [count, first] = kinds[waits_in(*fibre)];
      if (count++ == 0) first = fibre;
    }
  std::string message =
      "kernel " + symbol(state.launch.kernel) + ": deadlock, no thread can go on:";
  for (const auto& [what, found] : kinds)
    message += "\n  " + name_of(*found.second) +
               (found.first > 1 ? " and " + std::to_string(found.first - 1) + " more: " : ": ") +
               what;
  return message;
}

// ---- blocks

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
  pauses = 0;
  if (_setjmp(host) == 0) resume_any();
  state.current = nullptr;
  if (!state.error.empty()) return;
  for (const auto& block : state.blocks)
    if (block->alive > 0) {
      state.error = deadlock();
      return;
    }
  for (const auto& block : state.blocks) check_guards(*block);
}

// ---- barriers

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
  pauses = 0;
  if (block.alive > 0 && block.alive == block.waiting.size()) pass_block_barrier(block);
  wait_for(Wait::kEnd, {});
}

// ---- warps

// The lane whose value a shuffle returns.
int source_lane(WarpCall call, int lane, int argument, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  switch (call) {
    case WarpCall::kShuffle: return first + (argument & (width - 1));
    case WarpCall::kShuffleUp: {
      const auto delta = static_cast<unsigned>(argument);
      return delta > static_cast<unsigned>(lane - first) ? lane : lane - argument;
    }
    case WarpCall::kShuffleDown: {
      const auto delta = static_cast<unsigned>(argument);
      return delta > static_cast<unsigned>(last - lane) ? lane : lane + argument;
    }
    default: {
      const int other = lane ^ argument;
      return other > last || other < 0 ? lane : other;
    }
  }
}

void shuffle(Warp& warp, uint32_t mask, WarpCall call) {
  uint64_t values[32];
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) values[lane] = warp.lanes[lane]->exchange.value;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Lane& mine = warp.lanes[lane]->exchange;
    const int source = source_lane(call, lane, mine.argument, mine.width);
    if (!(mask >> source & 1)) {
      activate(warp.lanes[lane]);
      fail("%s with mask %s at %s reads lane %d, which is not in the mask", name_of(call),
           hex(mask).c_str(), where(warp.lanes[lane]->site).c_str(), source);
    }
    mine.value = values[source];
  }
}

uint64_t reduce(WarpCall call, uint64_t a, uint64_t b) {
  const auto x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
  const auto sx = static_cast<int32_t>(x), sy = static_cast<int32_t>(y);
  switch (call) {
    case WarpCall::kAddUnsigned: return x + y;
    case WarpCall::kMinUnsigned: return std::min(x, y);
    case WarpCall::kMaxUnsigned: return std::max(x, y);
    case WarpCall::kMinSigned: return static_cast<uint32_t>(std::min(sx, sy));
    case WarpCall::kMaxSigned: return static_cast<uint32_t>(std::max(sx, sy));
    case WarpCall::kAnd: return x & y;
    case WarpCall::kOr: return x | y;
    default: return x ^ y;
  }
}

float towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::isfinite(nearest) && fabs(static_cast<double>(nearest)) > fabs(value)
             ? nextafterf(nearest, 0.0f)
             : nearest;
}

// Rows of a fragment are in groups of four lanes: `group` is lane / 4, `member` lane % 4. With two
// elements a register, column k of A is element k % 2 of register pair k / 8 of member k / 2 % 4.
void multiply(Warp& warp, WarpCall call) {
  const bool halves = call != WarpCall::kMmaTf32;
  const int depth = halves ? 16 : 8;
  const auto element = [&](uint32_t word, int half) -> double {
    if (!halves) return float_of_bits(word & 0xFFFFE000u);
    const auto bits = static_cast<uint16_t>(word >> 16 * half);
    return call == WarpCall::kMmaBFloat16 ? float_of_bfloat16(bits) : float_of_float16(bits);
  };
  double a[16][16], b[16][8];
  for (int k = 0; k < depth; ++k) {
    const int member = halves ? k / 2 % 4 : k % 4, column = halves ? k / 8 : k / 4;
    for (int row = 0; row < 16; ++row)
      a[row][k] =
          element(warp.lanes[row % 8 * 4 + member]->exchange.a[row / 8 + 2 * column], k % 2);
    for (int n = 0; n < 8; ++n)
      b[k][n] = element(warp.lanes[n * 4 + member]->exchange.b[column], k % 2);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& d = warp.lanes[lane]->exchange.d[i];
      double sum = d;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      d = towards_zero(sum);
    }
}

void finish(Warp& warp, uint32_t mask, WarpCall call) {
  const auto each = [&](auto&& f) {
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) f(warp.lanes[lane]->exchange, lane);
  };
  switch (call) {
    case WarpCall::kSync: break;
    case WarpCall::kShuffle:
    case WarpCall::kShuffleUp:
    case WarpCall::kShuffleDown:
    case WarpCall::kShuffleXor: shuffle(warp, mask, call); break;
    case WarpCall::kBallot: {
      uint32_t votes = 0;
      each([&](Lane& lane, int i) { votes |= (lane.value ? 1u : 0u) << i; });
      each([&](Lane& lane, int) { lane.value = votes; });
      break;
    }
    case WarpCall::kMatchAny:
    case WarpCall::kMatchAll: {
      uint64_t values[32];
      each([&](Lane& lane, int i) { values[i] = lane.value; });
      each([&](Lane& lane, int i) {
        uint32_t same = 0;
        each([&](Lane&, int j) { same |= (values[i] == values[j] ? 1u : 0u) << j; });
        lane.value = call == WarpCall::kMatchAny || same == mask ? same : 0;
      });
      break;
    }
    case WarpCall::kMmaTf32:
    case WarpCall::kMmaBFloat16:
    case WarpCall::kMmaFloat16: multiply(warp, call); break;
    default: {
      const uint64_t* first = nullptr;
      uint64_t total = 0;
      each([&](Lane& lane, int) {
        total = first ? reduce(call, total, lane.value) : lane.value;
        first = &lane.value;
      });
      each([&](Lane& lane, int) { lane.value = total; });
    }
  }
}

}  // namespace

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
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

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  state.error =
      "kernel " + symbol(state.launch.kernel) + ", " + name_of(*state.current) + ": " + text;
  to_host();
}

Limits& device() { return limits; }

void set_seed(uint64_t seed) { next_seed = seed; }

unsigned char* shared_memory() { return state.current->block->shared; }

unsigned lane_number() { return state.current->lane; }

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

void pause() {
  if (++pauses > kMostPauses) fail("no thread gets any further: what they poll does not change");
  state.ready.push_back(state.current);
  suspend();
}

void fence() { state.fenced = true; }

uint64_t warp_call(WarpCall call, uint32_t mask, Lane lane, Site site) {
  Fibre* self = state.current;
  Warp& warp = *self->warp;
  const auto complain = [&](const char* what) {
    fail("%s with mask %s at %s: %s", name_of(call), hex(mask).c_str(), where(site).c_str(), what);
  };
  if (!(mask >> self->lane & 1)) complain("the mask lacks the lane that calls");
  if (mask & ~warp.alive)
    complain("the mask names lanes that have returned or that the block does not have");
  if (lane.width < 1 || lane.width > 32 || (lane.width & (lane.width - 1)) != 0)
    complain("the width is not a power of two up to 32");

  Warp::Meeting* meeting = nullptr;
  for (int i = 0; i < warp.open; ++i) {
    Warp::Meeting& other = warp.meetings[i];
    if (other.mask == mask && other.call == call) {
      meeting = &other;
    } else if ((other.mask >> self->lane & 1) && (other.arrived & mask)) {
      complain(("waits for lanes that wait for it in " + std::string(name_of(other.call)) +
                " with mask " + hex(other.mask))
                   .c_str());
    }
  }
  if (!meeting) {
    meeting = &warp.meetings[warp.open++];
    *meeting = {mask, 0, call};
  }
  meeting->arrived |= 1u << self->lane;
  self->call = call;
  self->mask = mask;
  self->exchange = lane;
  self->site = site;
  if (meeting->arrived == mask) {
    *meeting = warp.meetings[--warp.open];
    finish(warp, mask, call);
    static std::vector<Fibre*>
        members;  // not of a frame, which a failure would leave without return
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) members.push_back(warp.lanes[i]);
    make_ready(members);
  }
  wait_for(Wait::kWarp, site);
  return self->exchange.value;
}

// ---- atomics

template <class T>
T atomic(AtomicCall call, T* address, T value, T compare) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
    fail("an atomic on %zu bytes at %p, which is misaligned", sizeof(T),
         static_cast<void*>(address));
  check_access(address, sizeof(T), Use::kAtomic, __builtin_return_address(0));
  const T old = *address;
  switch (call) {
    case AtomicCall::kAdd: *address = old + value; break;
    case AtomicCall::kExchange: *address = value; break;
    case AtomicCall::kMin: *address = std::min(old, value); break;
    case AtomicCall::kMax: *address = std::max(old, value); break;
    case AtomicCall::kCompareAndSwap:
      if (old == compare) *address = value;
      break;
    case AtomicCall::kIncrement: *address = old >= value ? T(0) : old + 1; break;
    case AtomicCall::kDecrement: *address = old == 0 || old > value ? value : old - 1; break;
    default:
      if constexpr (std::is_integral_v<T>)
        *address = call == AtomicCall::kAnd  ? old & value
                   : call == AtomicCall::kOr ? old | value
                                             : old ^ value;
  }
  if (random_below(4) == 0) pause();  // others may come between, and loops that poll end
  return old;
}
template int atomic(AtomicCall, int*, int, int);
template unsigned atomic(AtomicCall, unsigned*, unsigned, unsigned);
template long long atomic(AtomicCall, long long*, long long, long long);
template unsigned long long atomic(AtomicCall, unsigned long long*, unsigned long long,
                                   unsigned long long);
template float atomic(AtomicCall, float*, float, float);
template double atomic(AtomicCall, double*, double, double);

// ---- asynchronous copies

void copy_async(void* shared, const void* global, int bytes, Site site) {
  Fibre* self = state.current;
  const auto complain = [&](const char* what) {
    fail("cp_async16 at %s: %s", where(site).c_str(), what);
  };
  auto* to = static_cast<unsigned char*>(shared);
  const Block& block = *self->block;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0)
    complain("the shared address is not a multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    complain("the global address is not a multiple of 16 bytes");
  if (bytes < 0 || bytes > 16) complain("the number of bytes is not in 0 ... 16");
  if (to < block.shared || to + 16 > block.shared + state.launch.shared)
    complain("the target is not in the block's shared memory");
  const void* code = __builtin_return_address(0);
  if (bytes > 0) check_access(global, static_cast<size_t>(bytes), Use::kRead, code);
  check_access(to, 16, Use::kIssueCopy, code);
  Copy copy = {to, global, bytes, (random_number() & 1) != 0, {}};
  if (copy.read_at_issue) memcpy(copy.data, global, static_cast<size_t>(bytes));
  memset(to, kPoison, 16);  // the copy may happen from now on
  self->copies.push_back(copy);
}

void commit_copies() {
  Fibre* self = state.current;
  self->committed.push_back(self->copies.size() - std::accumulate(self->committed.begin(),
                                                                  self->committed.end(),
                                                                  size_t{0}));
}

void wait_for_copies(int groups) {
  Fibre* self = state.current;
  const void* code = __builtin_return_address(0);
  while (self->committed.size() > static_cast<size_t>(groups)) {
    const size_t count = self->committed[0];
    for (size_t i = 0; i < count; ++i) {
      Copy& copy = self->copies[i];
      if (!copy.read_at_issue) memcpy(copy.data, copy.global, static_cast<size_t>(copy.bytes));
      check_access(copy.shared, 16, Use::kFinishCopy, code);
      memcpy(copy.shared, copy.data, 16);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + static_cast<ptrdiff_t>(count));
    self->committed.erase(self->committed.begin());
  }
}

// ---- launches

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

// ---- CUDA's host functions

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  return ordinal == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal != 0) return cudaErrorInvalidDevice;
  const auto& limits = sparsebwd::cuda::emulator::device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = limits.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = limits.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = limits.shared_per_block;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}
