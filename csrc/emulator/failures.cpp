// SPDX-License-Identifier: Apache-2.0
// Messages about kernels that do what a GPU would not forgive.
#include <cstdarg>
#include <cstdio>
#include <map>

#include "fibres.h"

namespace sparsebwd::cuda::emulator {

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
  }
  return "?";
}

std::string hex(uint32_t mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

namespace {

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

}  // namespace

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

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
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

}  // namespace sparsebwd::cuda::emulator
