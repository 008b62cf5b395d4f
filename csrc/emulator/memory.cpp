// SPDX-License-Identifier: Apache-2.0
// Atomics, and asynchronous copies to shared memory.
#include <algorithm>
#include <numeric>

#include "fibres.h"

namespace sparsebwd::cuda::emulator {

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

}  // namespace sparsebwd::cuda::emulator
