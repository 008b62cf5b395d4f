// SPDX-License-Identifier: Apache-2.0
// What the rooms of the runtime share: the scheduler (fibres.cpp) and the words for what went wrong (failures.cpp).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime.h"

namespace sparsebwd::cuda::emulator {

constexpr unsigned char kPoison = 0xFF;  // makes NaNs of all types

// Of the launch: SplitMix64.
uint64_t random_number();
size_t random_below(size_t bound);

extern std::vector<std::unique_ptr<Fibre>> pool;
void grow_pool(size_t fibres);
// Whatever was left in the middle on that stack is forgotten.
void reset(Fibre& fibre);

// Runs fibres until none is ready, or one has failed. Called by the launch.
void run_until_none_is_ready();
[[noreturn]] void to_host();
// A thread has got past a barrier, or ended: what others poll may change.
void note_progress();
// The thread whose indices kernels and messages see.
void activate(Fibre* fibre);
void wait_for(Wait wait, Site site);
void make_ready(Fibre* fibre);
void make_ready(std::vector<Fibre*>& fibres);
// What a fibre calls behind the kernel.
void end_of_thread();

std::string where(Site site);
const char* name_of(WarpCall call);
std::string hex(uint32_t mask);
std::string deadlock();

}  // namespace sparsebwd::cuda::emulator
