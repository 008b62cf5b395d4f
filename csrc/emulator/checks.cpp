// SPDX-License-Identifier: Apache-2.0
#include "runtime.h"
namespace sparsebwd::cuda::emulator {
void add_buffer(const void*, size_t, const char*, bool, bool) {}
void clear_buffers() {}
void check_access(const void*, size_t, Use, const void*) {}
std::string take_host_error() { return ""; }
}
