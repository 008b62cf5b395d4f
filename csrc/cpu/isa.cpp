// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <stdlib.h>

#include <stdexcept>

namespace sparsebwd {
namespace {

bool always() { return true; }

#ifdef SPARSEBWD_X86
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Isa {
  bool (*runs_here)();
  IsaKernels kernels;
};

// Lowest first. The compiler flags of each are in setup.py.
const Isa kIsas[] = {
    {always,
     {"baseline", prune_kernels_baseline, conv_kernels_baseline, depthwise_kernels_baseline}},
#ifdef SPARSEBWD_X86
    {has_avx2, {"avx2", prune_kernels_avx2, conv_kernels_avx2, depthwise_kernels_avx2}},
    {has_avx512, {"avx512", prune_kernels_avx512, conv_kernels_avx512, depthwise_kernels_avx512}},
#endif
#ifdef SPARSEBWD_AARCH64
    {always, {"neon", prune_kernels_neon, conv_kernels_neon, depthwise_kernels_neon}},
#endif
};

// "baseline, avx2 and avx512"
std::string names() {
  constexpr size_t kCount = sizeof(kIsas) / sizeof(kIsas[0]);
  std::string result;
  for (size_t i = 0; i < kCount; ++i)
    result += (i == 0 ? "" : i + 1 < kCount ? ", " : " and ") + std::string(kIsas[i].kernels.name);
  return result;
}

const IsaKernels& choose_kernels() {
  const char* variable = getenv("SPARSEBWD_MAX_ISA");
  const std::string limit = variable ? variable : "";
  const IsaKernels* chosen = nullptr;
  bool known = limit.empty();
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) chosen = &isa.kernels;
    known = known || limit == isa.kernels.name;
    if (limit == isa.kernels.name) break;
  }
  if (!known)
    throw std::invalid_argument("SPARSEBWD_MAX_ISA: got '" + limit + "', accepted are " + names());
  return *chosen;
}

}  // namespace

const IsaKernels& active_kernels() {
  static const IsaKernels& kernels = choose_kernels();
  return kernels;
}

std::vector<const IsaKernels*> supported_kernels() {
  std::vector<const IsaKernels*> found;
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) found.push_back(&isa.kernels);
  return found;
}

}  // namespace sparsebwd
